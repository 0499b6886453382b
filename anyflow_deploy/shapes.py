"""Train the small models `shapes` and `far-shapes` from nothing: `python -m anyflow_deploy.shapes`.

docs/tutorials/distil-your-own.md tells every stage.
"""

from anyflow_deploy.cli.entry_points import shapes as main

if __name__ == "__main__":
    main()
