"""What dataset_tools.py runs."""
