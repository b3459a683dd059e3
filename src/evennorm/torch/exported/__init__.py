"""Make a torch.nn model of a program of torch.export, from what its file says and without running anything in it."""
