#!/usr/bin/env bash
# The kernels for CPU under sanitizers. Under address and undefined: every set of instructions that
# this processor has, held to long double apart from Python, and what XLA calls, by the tests. Under
# thread: what XLA calls, in XLA's place. An environment with normax's tests has to be active.
# It takes a quarter of an hour, much of it compiling, and ends with "clean".
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$here/../..
native=$root/normax/kernels/native
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
xla=$(python -c "import jax; print(jax.ffi.include_dir())")
options=(-std=c++17 -O1 -g -fPIC -fno-math-errno -fno-trapping-math -ffp-contract=off -Wno-psabi
  "-I$native" -isystem "$xla")
calls=("$native"/{interface,call_rows,call_columns,call_columns_written,call_groups}.cc)

levels=(baseline)
if grep -q avx2 /proc/cpuinfo; then levels+=(avx2); fi
if grep -q avx512bw /proc/cpuinfo; then levels+=(avx512); fi
declare -A sets=([baseline]="" [avx2]="-mavx2 -mfma -mf16c"
  [avx512]="-mavx512f -mavx512vl -mavx512bw -mavx512dq -mfma -mf16c")

address=(-fsanitize=address,undefined -fno-sanitize-recover=undefined)
for level in "${levels[@]}"; do
  # shellcheck disable=SC2086
  g++ "${options[@]}" "${address[@]}" ${sets[$level]} "-DLEVEL=$level" \
    -c "$native/kernels.cc" -o "$work/$level.o"
done
g++ "${options[@]}" "${address[@]}" "$here/../kernel_levels.cc" "$work"/*.o -o "$work/held"
"$work/held"

# The tests' own copy of normax; what Python and XLA do not give back at the end is not asked.
cp -r "$root/normax" "$root/tests" "$root/pyproject.toml" "$work"
g++ "${options[@]}" "${address[@]}" -shared "${calls[@]}" "$work/baseline.o" -pthread \
  -o "$work/normax/kernels/libnormax_cpu.so"
(
  cd "$work"
  preloaded=$(g++ -print-file-name=libasan.so):$(g++ -print-file-name=libstdc++.so)
  LD_PRELOAD=$preloaded ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$work \
    python -m pytest -q -p no:cacheprovider tests/test_kernels_cpu.py \
    -k "not 65536 and not instructions"
)

g++ "${options[@]}" -fsanitize=thread -DLEVEL=baseline "-I$here" \
  "$native/kernels.cc" "${calls[@]}" "$here/threads.cc" -o "$work/threads" -pthread
"$work/threads"
echo clean
