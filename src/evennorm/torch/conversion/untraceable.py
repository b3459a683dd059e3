"""The reason why no graph can stand for the code of a forward."""


class Untraceable(BaseException):
    """Continues a sentence that begins with the forward.

    Not an Exception, since it passes through the code that is traced, which may catch those.
    """
