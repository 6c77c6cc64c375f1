"""Hand settings.ini to the packager; the other facts are in pyproject.toml."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

parser = ConfigParser(delimiters=["="])
parser.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]


def lines(text):
    return [line.strip() for line in text.splitlines() if line.strip()]


setup(
    author=settings["author"],
    keywords=settings["keywords"].split(),
    classifiers=[
        f"Development Status :: {settings['status']}",
        f"Intended Audience :: {settings['audience']}",
        f"Natural Language :: {settings['language']}",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    install_requires=lines(settings["requirements"]),
    extras_require={
        name.removesuffix("_requirements"): lines(value)
        for name, value in settings.items()
        if name.endswith("_requirements")
    },
)
