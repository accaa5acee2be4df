#!/usr/bin/env bash
# The kernels for CPU under sanitizers, apart from Python: every set of instructions that this
# processor has held to long double under address and undefined, and threads under thread.
# It takes ten minutes, most of it compiling, and ends with "clean".
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
native=$here/../../normax/kernels/native
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
options=(-std=c++17 -O1 -g -fno-math-errno -fno-trapping-math -ffp-contract=off -Wno-psabi "-I$native")

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

thread=(-fsanitize=thread "-I$here")
g++ "${options[@]}" "${thread[@]}" -DLEVEL=baseline "$native/kernels.cc" "$here/threads.cc" \
  -o "$work/threads" -pthread
"$work/threads"
echo clean
