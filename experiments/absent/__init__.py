"""What would the compilers make of the step on hardware that is not here? `make absent`.

hardware    devices that are only described
programs    what is compiled, and what is counted in it
report      the table and the picture, from the record alone
__main__    the program
"""
