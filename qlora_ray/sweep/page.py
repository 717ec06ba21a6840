"""placeholder"""


def write(run, config, ledger, summary):
    pass
