"""tmp"""
def write(workdir): pass
