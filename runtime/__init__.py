"""What an exported model needs at run time: integer linears, rotations, formats. Imports torch alone."""
