def write_report(lab):
    raise NotImplementedError
