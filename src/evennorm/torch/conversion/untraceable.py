"""Define the reason why no graph can replace the code of a forward."""


class Untraceable(BaseException):
    """The reason, as the rest of a sentence whose subject is the forward.

    Not an Exception, since it passes through the code that is traced, which may catch those.
    """
