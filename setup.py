"""Package metadata lives in settings.ini; this file only translates it for setuptools."""

import configparser
import pathlib

from setuptools import find_namespace_packages, setup

HERE = pathlib.Path(__file__).parent
parser = configparser.ConfigParser(delimiters=["="])
parser.read(HERE / "settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]

suffix = "_requirements"
extras = {key.removesuffix(suffix): settings[key].split() for key in settings if key.endswith(suffix)}
apart = {"dev", "docs", "gpu"}  # gpu: half a gigabyte, for those who have a card
extras["all"] = sorted({need for name, needs in extras.items() if name not in apart for need in needs})

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=settings["author"],
    author_email=settings["author_email"],
    url=settings["git_url"],
    keywords=settings["keywords"].split(),
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=f">={settings['min_python']}",
    packages=find_namespace_packages(include=["trader_lib", "trader_lib.*"]),
    include_package_data=True,
    package_data={
        "trader_lib": [
            "py.typed",
            "**/*.parquet",
            "**/*.ipynb",
            "**/*.json",
            "**/*.md",
            "**/*.toml",
            "observe/static/*",
        ]
    },
    install_requires=settings["requirements"].split(),
    extras_require=extras,
    entry_points={
        "console_scripts": settings["console_scripts"].split(),
        "nbdev": [f"{settings['lib_name']}={settings['lib_name']}._modidx:d"],
        "pytest11": ["trader_lib.exchange.testing = trader_lib.exchange.testing"],
        "trader_lib.strategies": [
            "sma_cross = trader_lib.strategy.sma_cross:SmaCross",
            "rsi_reversion = trader_lib.strategy.rsi_reversion:RsiReversion",
            "momentum = trader_lib.strategy.momentum:Momentum",
            "vol_target = trader_lib.strategy.vol_target:VolTarget",
            "opening_range = trader_lib.strategy.opening_range:OpeningRange",
            "pairs = trader_lib.strategy.pairs:Pairs",
        ],
    },
    zip_safe=False,
)
