"""Where the floors meet: the server loop, the worker loop and what the terminal shows."""
