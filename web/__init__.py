"""What web_demo.py runs: a page with a budget slider."""
