"""`python -m medviz COMMAND`: one module for each command, each with `main(arguments)`."""
