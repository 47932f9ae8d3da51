"""One command for the first GPU: everything that only a GPU can tell, in order of worth, within a given time.

`table.py` lists the steps, `runner.py` runs each in a process of its own, `page.py` keeps what they found; the other modules measure."""
