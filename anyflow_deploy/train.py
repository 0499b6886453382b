"""Train: `python -m anyflow_deploy.train RECIPE [flags]`, also under torchrun. See
docs/how-to/training.md."""

from anyflow_deploy.cli.train import main

if __name__ == "__main__":
    main()
