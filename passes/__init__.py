"""The built-in passes; importing this package registers all of them."""

if __name__ == "passes":
    raise ImportError("the folder 'passes' installs as 'graphopt.passes': import that instead")
