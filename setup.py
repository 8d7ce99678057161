"Reads settings.ini, the one place where the package is described."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here/"settings.ini", encoding="utf-8")
s = config["DEFAULT"]

setup(
    name=s["lib_name"],
    version=s["version"],
    description=s["description"],
    long_description=(here/"README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=s["author"],
    author_email=s["author_email"],
    url=s["git_url"],
    license="MIT",
    license_files=["LICENSE", "ddpm_tutorial/assets/LICENSE-fashion-mnist.txt"],
    keywords=s["keywords"],
    classifiers=["Intended Audience :: Education", "Programming Language :: Python :: 3"],
    packages=find_packages(include=[s["lib_name"], s["lib_name"] + ".*"]),
    package_data={s["lib_name"]: ["assets/*"]},
    python_requires=">=" + s["min_python"],
    install_requires=s["requirements"].split(),
    extras_require={name: s[f"{name}_requirements"].split() for name in ("dev", "emoji", "bert")},
    entry_points={
        "console_scripts": s["console_scripts"].split(),
        "nbdev": [f"{s['lib_name']}={s['lib_name']}._modidx:d"],   # lets nbdev link to these docs
    },
)
