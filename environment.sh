# Sourced by the scripts beside it: puts a python with requirements.txt on the PATH.
# The active virtual environment if there is one, else .venv here, made on first use. Installs only what has changed.

if [[ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]]; then
    if [[ ! -x .venv/bin/python ]]; then
        for python in python3.13 python3.12 python3.11 python3.10 python3; do
            if "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then break; fi
            python=""
        done
        if [[ -z "$python" ]]; then
            echo "No Python from 3.10 to 3.13 was found. Install one, or activate an environment that has it." >&2
            exit 1
        fi
        echo "Making a virtual environment in .venv with $("$python" --version)"
        if ! "$python" -m venv .venv; then
            rm -rf .venv
            echo "That failed. On Debian and Ubuntu:  sudo apt-get install python3-venv" >&2
            exit 1
        fi
    fi
    PATH="$PWD/.venv/bin:$PATH"    # not activated: VIRTUAL_ENV would say that the shell which started this finds it too
    unset PYTHONHOME
fi

if ! prefix=$(python -c 'import sys; print(sys.prefix); sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))'); then
    echo "Needed is Python 3.10 to 3.13, and $(command -v python || echo python) is $(python --version 2>&1)." \
         "Activate an environment that has one, or none: then .venv here is used." >&2
    exit 1
fi

stamp="$prefix/.installed-$(cat requirements*.txt | cksum | cut -d' ' -f1)"
if [[ ! -e "$stamp" ]]; then
    # A torch that is there already stays (2.11 or newer will do): it may be the build that fits this machine's GPU.
    wanted=$(mktemp)
    sed -e "s|^-r |-r $PWD/|" requirements.txt > "$wanted"
    if python -c 'import importlib.metadata as m; v = m.version("torch").split("."); assert (int(v[0]), int(v[1])) >= (2, 11)' 2>/dev/null; then
        sed -i.all -e '/^torch==/d' "$wanted" && rm -f "$wanted.all"
    elif [[ $(uname) == Linux && ! -e /proc/driver/nvidia && -z "${PIP_EXTRA_INDEX_URL:-}" ]] && ! command -v nvidia-smi > /dev/null; then
        echo "A large download: CUDA's libraries come along with torch, though no NVIDIA GPU is visible here." \
             "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu before the command makes it small."
    fi
    echo "Installing requirements.txt"
    installed=1
    python -m pip install --quiet --disable-pip-version-check -r "$wanted" || installed=0
    rm -f "$wanted"
    if [[ $installed == 0 ]]; then
        echo "The installation failed (above is pip's reason). Without a network nothing can be installed." >&2
        exit 1
    fi
    touch "$stamp" 2>/dev/null || true
fi
