#!/usr/bin/env bash
# Builds the programs of the images for one architecture: build.sh ARCH LDFLAGS.
# For another one than this machine's with Debian's cross compiler, against the
# headers and libraries that `test/install.sh images` has unpacked.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
arch=$1 ldflags=$2
out=$root/bin/images/$arch
mkdir -p "$out"
cd "$root"
export GOOS=linux GOARCH=$arch
go() { command go build -trimpath -buildvcs=false -ldflags "$ldflags" -o "$out/" "$@"; }
CGO_ENABLED=0 go ./cmd/csi-plugin
if [ "$arch" != "$(dpkg --print-architecture)" ]; then
	[ "$arch" = arm64 ] || { echo "no cross compiler for $arch is known here" >&2; exit 1; }
	tree=$root/.cache/images/$arch/root
	export CC="aarch64-linux-gnu-gcc --sysroot=$tree"
	export PKG_CONFIG_LIBDIR=$tree/usr/lib/aarch64-linux-gnu/pkgconfig PKG_CONFIG_SYSROOT_DIR=$tree
fi
export CGO_ENABLED=1
go ./cmd/crypt-worker
go ./cmd/key-service
