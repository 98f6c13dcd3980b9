# Shared by scripts/demo and scripts/test, which source it from the root of the checkout.
#
#   prepare_venv demo    makes .venv and installs the package
#   prepare_venv dev     the same with what the tests need
#
# Nothing is done when pyproject.toml has not changed since. The environment can say:
#   PYTHON                  the interpreter to start from (3.11 or newer)
#   COCODIFF_TORCH          what to install when there is no torch yet (default: the version tested)
#   COCODIFF_TORCH_INDEX    the package index to take torch from, such as PyTorch's own with its CPU-only builds

_is_python() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

_has_torch() {
    "$1" -c 'import sys, torch; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10))' 2>/dev/null
}

# Prints the interpreter to start from: the first with a usable torch, else the first of all.
_find_python() {
    local python first=""
    for python in ${PYTHON:-python3.11 python3 python3.12 python3.13 python}; do
        _is_python "$python" || continue
        if _has_torch "$python"; then
            echo "$python"
            return
        fi
        first="${first:-$python}"
    done
    if [ -z "$first" ]; then
        echo "no Python 3.11 or newer with venv and ensurepip among: ${PYTHON:-python3.11 python3 ...}." \
            "Install one (Debian: python3-venv too) or name it: PYTHON=/path/to/python $0" >&2
        return 1
    fi
    echo "$first"
}

prepare_venv() {
    local extra="$1" python key
    local venv="$PWD/.venv"
    key="$(cat pyproject.toml setup.py | cksum) $PWD"
    if [ "$(cat "$venv/.installed-$extra" 2>/dev/null)" != "$key" ]; then
        if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
            python="$(_find_python)" || return 1
            # With a torch that is already there the new environment sees it, and whatever else is there and fits.
            if _has_torch "$python"; then
                echo "making .venv from $python, with the torch that is already there"
                "$python" -m venv --clear --system-site-packages "$venv"
            else
                echo "making .venv from $python"
                "$python" -m venv --clear "$venv"
            fi
        fi
        local pip=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet)
        if ! _has_torch "$venv/bin/python"; then
            echo "installing ${COCODIFF_TORCH:-torch==2.13.0} (once; the CUDA build of Linux is large)"
            "${pip[@]}" ${COCODIFF_TORCH_INDEX:+--index-url "$COCODIFF_TORCH_INDEX"} "${COCODIFF_TORCH:-torch==2.13.0}"
        fi
        echo "installing cocodiff and what it needs"
        case "$extra" in
            demo) "${pip[@]}" --editable . ;;
            *) "${pip[@]}" --editable ".[$extra]" ;;
        esac
        echo "$key" >"$venv/.installed-$extra"
        [ "$extra" = demo ] || echo "$key" >"$venv/.installed-demo"
    fi
    # Programs of packages that .venv shares with its interpreter (mpiexec, say) lie beside that interpreter.
    PATH="$venv/bin:$PATH:$("$venv/bin/python" -c 'import sys; print(sys.base_prefix)')/bin"
    export PATH
}
