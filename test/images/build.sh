#!/usr/bin/env bash
# Builds the programs of the images, or those that are named, for one architecture:
# build.sh ARCH LDFLAGS [PROGRAM...]. For another one than this machine's with
# Debian's cross compiler, against the headers and libraries that
# `test/install.sh images` has unpacked.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
arch=$1 ldflags=$2
shift 2
[ $# -gt 0 ] || set -- csi-plugin crypt-worker key-service
out=$root/bin/images/$arch
mkdir -p "$out"
cd "$root"
export GOOS=linux GOARCH=$arch
if [ "$arch" != "$(dpkg --print-architecture)" ]; then
	[ "$arch" = arm64 ] || { echo "no cross compiler for $arch is known here" >&2; exit 1; }
	tree=$root/.cache/images/$arch/root
	export CC="aarch64-linux-gnu-gcc --sysroot=$tree"
	export PKG_CONFIG_LIBDIR=$tree/usr/lib/aarch64-linux-gnu/pkgconfig PKG_CONFIG_SYSROOT_DIR=$tree
fi
for program; do
	cgo=1
	[ "$program" != csi-plugin ] || cgo=0
	CGO_ENABLED=$cgo go build -trimpath -buildvcs=false -ldflags "$ldflags" -o "$out/" "./cmd/$program"
done
