"""The command line: `app.main` is the entry point, `cmd_*.py` one file a command, `render.py` all that is printed."""
