"""How `minw.pack` translates a traced network, equation by equation.

    builder      the program as far as it is written
    layer_rules  the operations that minw's layers become
    array_rules  the operations that stand between layers
"""
