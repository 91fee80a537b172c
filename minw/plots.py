"""placeholder"""
def curves(workdir): pass
