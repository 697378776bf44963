"""Every field with its default: `lfm_jax/config.py` defines and comments them, this shows them.

    python configs/base.py        prints them with their comments

An experiment starts from here: `config = default_config()`, then sets what differs.
"""

from ml_collections import ConfigDict

from lfm_jax.config import default_config


def get_config() -> ConfigDict:
    return default_config()


if __name__ == "__main__":
    import inspect

    print(inspect.getsource(default_config))
