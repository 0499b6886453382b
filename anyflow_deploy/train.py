"""Train: `python -m anyflow_deploy.train RECIPE [flags]`, also under torchrun.

docs/how-to/training.md describes it.
"""

from anyflow_deploy.cli.entry_points import train as main

if __name__ == "__main__":
    main()
