#!/usr/bin/env bash
# Installs what building, testing and demonstrating cryptcsi needs, and nothing
# that is there already. Made for Debian 12 (bookworm); run as root or with sudo.
#
#   test/install.sh [GROUP...]        default: packages go
#
#   packages  Debian packages: compiler, libcryptsetup, mkfs programs, the
#             user-mode-linux kernel that tests run on where the machine's own
#             kernel has no device-mapper
#   go        a Go toolchain under .cache/go, where `go` is missing or too old, and
#             the modules that the programs and their tests are built from
#   qemu      QEMU, and the distribution's kernel unpacked under .cache/kernel
#             (it is not installed on the machine)
#   peers     the servers that tests of KMS and stores talk to: Debian packages,
#             and programs built from test/peers/*/ into .tools/bin; or with
#             peers=NAME only the one in test/peers/NAME. One whose folder holds a
#             file on-demand takes minutes to build and has to be named
#   cryptsetup-next  the oldest and the newest libcryptsetup that Debian has, with
#             all libraries below them, under .cache/cryptsetup-next (they are not
#             installed on the machine, nor are their suites added to its apt)
#   e2e       Kubernetes (without its own images) and the sidecars of CSI, built
#             from test/e2e/*/ into .tools/bin, what a node needs besides, and
#             images
#   e2e-storage  the storage tests of Kubernetes, built from test/e2e/storage
#   e2e-previous  the build from which tests upgrade, under .tools/previous
#   images    what container images are assembled from: Debian's packages for amd64
#             and arm64 unpacked under .cache/images, a cross compiler, and skopeo
#             with a registry to push to in a test
#   tools     linters, built from the versions pinned in test/tools/go.mod
#             into .tools/bin
#
# Prints one line for each thing it does; says nothing where all is there.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=$root/.cache

# The toolchain that is fetched. The checksum is that of the module's zip file.
go_version=1.26.8
go_sha256=30c2b1bf7dcc88d3eb0a1364e47ddd9128edb3110a30e8a0ef61cd5856b31de7

packages=(
	# build
	ca-certificates gcc git libc6-dev make pkg-config
	libcryptsetup-dev libdevmapper-dev
	protobuf-compiler
	# used by the programs and by their tests
	cryptsetup-bin dmsetup e2fsprogs xfsprogs btrfs-progs
	kmod mount util-linux
	# the guest kernel
	user-mode-linux busybox-static
)

peer_packages=(
	python3-pykmip  # a KMIP server
	softhsm2 opensc # a PKCS#11 module, and a tool to ask it
)

e2e_packages=(containerd crun containernetworking-plugins iproute2)

# What tests upgrade from: the newest release; until there is one, this commit.
previous=84298883a730b7f95331d8f6a04ecfb36e350492

image_packages=(gcc-aarch64-linux-gnu libc6-dev-arm64-cross skopeo docker-registry)

# Whose cryptsetup the tests use besides the machine's own: 2.3 and 2.8.
cryptsetup_suites=(bullseye forky)

# Seconds before what has failed is tried the second time, twice as many before the
# third.
pause=${INSTALL_PAUSE:-15}

say() { printf 'install: %s\n' "$*" >&2; }
fail() {
	say "$*"
	exit 1
}

# missing PACKAGE... prints those that dpkg does not know as installed.
missing() {
	local installed
	installed=$'\n'$(dpkg-query -W -f='${db:Status-Status} ${Package}\n' "$@" 2>/dev/null || true)$'\n'
	local p
	for p in "$@"; do
		[[ $installed == *$'\n'"installed $p"$'\n'* ]] || printf '%s\n' "$p"
	done
}

# quietly TEXT COMMAND... runs COMMAND in a subshell and prints TEXT with the
# seconds it took; where it fails, also the end of what it said. Nearly all of it
# is downloading, so what fails is tried three times: it goes on where it was, or
# begins anew. Not to be called in a condition: the shell would then ignore
# failures within COMMAND.
quietly() {
	local text=$1 log status start=$SECONDS try
	shift
	log=$(mktemp)
	for try in 1 2 3; do
		set +e
		(
			set -e
			"$@"
		) >"$log" 2>&1
		status=$?
		set -e
		[ $status != 0 ] || break
		tail -n 20 "$log" >&2
		[ $try = 3 ] || {
			say "failed, tried again in $((try * pause)) s: $text"
			sleep $((try * pause))
		}
	done
	rm -f "$log"
	[ $status = 0 ] || fail "failed: $text"
	say "$text ($((SECONDS - start)) s)"
}

# as_root COMMAND... runs it as root; need_root has looked whether that can be.
as_root() {
	if [ "$(id -u)" = 0 ]; then
		"$@"
	else
		sudo "$@"
	fi
}

# need_root PACKAGE... fails with words where we cannot become root.
need_root() {
	[ "$(id -u)" = 0 ] && return
	command -v sudo >/dev/null && return
	fail "not root and there is no sudo. As root: apt-get install $*"
}

# debian PACKAGE... installs those that are missing.
debian() {
	command -v dpkg-query >/dev/null ||
		fail "this machine is not a Debian one. Install what these Debian packages hold, by hand: $*"
	local want
	mapfile -t want < <(missing "$@")
	[ ${#want[@]} = 0 ] && return
	need_root "${want[@]}"
	quietly "packages: ${want[*]}" install_packages "${want[@]}"
}

# install_packages PACKAGE... brings the lists up to date first, and waits for
# another apt-get to end.
install_packages() {
	as_root apt-get -q -o Acquire::Retries=3 update
	as_root env DEBIAN_FRONTEND=noninteractive apt-get -qy -o Acquire::Retries=3 -o DPkg::Lock::Timeout=600 --no-install-recommends install "$@"
}

# go_works tells whether the `go` at hand can build this module. Asked inside
# the module, a Go that fetches newer toolchains by itself counts.
go_works() {
	command -v go >/dev/null && (cd "$root" && go env GOVERSION) >/dev/null 2>&1
}

# proxies prints the module proxies to ask, one a line, as go itself would
# choose them: environment, then the user's settings, then go's default.
proxies() {
	local list=${GOPROXY:-} settings=${GOENV:-${XDG_CONFIG_HOME:-${HOME:-/root}/.config}/go/env}
	if [ -z "$list" ] && [ -r "$settings" ]; then
		list=$(sed -n 's/^GOPROXY=//p' "$settings")
	fi
	list=${list:-https://proxy.golang.org}
	grep -vxE 'direct|off|' <<<"${list//[,|]/$'\n'}" || true
}

download() { # URL FILE
	if command -v curl >/dev/null; then
		curl -fsSL --retry 3 -o "$2" "$1"
	else
		wget -q -O "$2" "$1"
	fi
}

unpack() { # ZIP DIRECTORY
	if command -v unzip >/dev/null; then
		unzip -q "$1" -d "$2"
	elif command -v python3 >/dev/null; then
		python3 -m zipfile -e "$1" "$2"
	else
		busybox unzip -q "$1" -d "$2"
	fi
}

fetch_go() { # DIRECTORY to work in
	local module=golang.org/toolchain@v0.0.1-go$go_version.linux-amd64 proxy
	for proxy in $(proxies); do
		download "${proxy%/}/${module/@//@v/}.zip" "$1/go.zip" || continue
		echo "$go_sha256  $1/go.zip" | sha256sum --check --status ||
			fail "$proxy gave a Go $go_version with another checksum than the pinned one; not used"
		unpack "$1/go.zip" "$1"
		# Module archives do not keep the execute permission.
		chmod -R +x "$1/$module/bin" "$1/$module/pkg/tool"
		rm -rf "$cache/go"
		mv "$1/$module" "$cache/go"
		return
	done
	fail "no Go $go_version to be had from: $(proxies | tr '\n' ' ')
install: install Go 1.26 or newer from https://go.dev/dl/ and put its bin directory into PATH"
}

install_go() {
	PATH=$cache/go/bin:$PATH
	go_works && return
	[ "$(uname -sm)" = "Linux x86_64" ] ||
		fail "no Go 1.26 or newer, and a pinned one is known for Linux on x86-64 only. Install Go from https://go.dev/dl/"
	command -v curl >/dev/null || command -v wget >/dev/null || debian ca-certificates curl
	command -v unzip >/dev/null || command -v python3 >/dev/null || command -v busybox >/dev/null || debian unzip
	mkdir -p "$cache"
	work=$(mktemp -d "$cache/go.XXXXXX") # global: the trap below outlives this function
	trap 'rm -rf "$work"' EXIT
	quietly "Go $go_version in .cache/go" fetch_go "$work"
	go_works || fail "the Go in .cache/go does not run; remove it and try again"
}

# install_modules fetches what go would fetch in the middle of a build, where nothing
# tries it again.
install_modules() {
	local stamp
	stamp=$(cat "$root/go.sum" "$root/test/gcepd/go.sum" | sha256sum)
	[ "$(cat "$cache/modules" 2>/dev/null)" = "$stamp" ] && return
	mkdir -p "$cache"
	quietly "Go modules" fetch_modules
	printf '%s\n' "$stamp" >"$cache/modules"
}

fetch_modules() {
	local dir
	for dir in "$root" "$root/test/gcepd"; do
		env -C "$dir" go list -deps -test ./... >/dev/null
	done
}

# fetch_kernel unpacks the newest kernel that linux-image-amd64 stands for.
fetch_kernel() { # DIRECTORY to work in
	local package
	package=$(apt-cache depends linux-image-amd64 | sed -n 's/^ *Depends: \(linux-image-[0-9]\S*\)$/\1/p' | head -n 1)
	[ -n "$package" ] || fail "apt-cache knows no linux-image-amd64; run apt-get update"
	(cd "$1" && apt-get -q download "$package")
	dpkg-deb -x "$1"/*.deb "$1/tree"
	depmod -b "$1/tree" "${package#linux-image-}"
	mv "$1/tree" "$cache/kernel"
}

install_qemu() {
	debian qemu-system-x86 busybox-static kmod
	[ -d "$cache/kernel" ] && return
	mkdir -p "$cache"
	work=$(mktemp -d "$cache/kernel.XXXXXX")
	trap 'rm -rf "$work"' EXIT
	PATH=$PATH:/sbin:/usr/sbin quietly "the distribution's kernel in .cache/kernel" fetch_kernel "$work"
}

# apt_of writes the configuration of an apt that knows one suite and no package
# as installed, and that shares with the machine's the proxies and Debian's keys.
# An index may be old, as on a mirror that lags: nothing is installed from it.
apt_of() { # SUITE DIRECTORY
	mkdir -p "$2"/{lists,archives}/partial
	: >"$2/status"
	echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian $1 main" >"$2/sources.list"
	{
		apt-config dump Acquire | grep -i '::proxy' || true
		cat <<-EOF
			Dir "$2";
			Dir::Bin::Methods "/usr/lib/apt/methods";
			Dir::Etc "$2";
			Dir::Etc::SourceParts "/dev/null";
			Dir::Etc::Parts "/dev/null";
			Dir::Etc::PreferencesParts "/dev/null";
			Dir::State "$2";
			Dir::State::Status "$2/status";
			Dir::Cache "$2";
			Acquire::AllowInsecureRepositories "false";
			Acquire::Check-Valid-Until "false";
			Acquire::Languages "none";
			Acquire::Retries "3";
		EOF
	} >"$2/apt.conf"
}

# fetch_cryptsetup unpacks a suite's cryptsetup into one directory: program,
# dynamic loader, and the libraries in lib.
fetch_cryptsetup() { # SUITE DIRECTORY to work in
	apt_of "$1" "$2/apt"
	export APT_CONFIG=$2/apt/apt.conf
	apt-get -q update
	apt-get -qy --no-install-recommends --download-only install libcryptsetup12 libpopt0
	# Alone: what the package depends on besides these libraries is a systemd.
	(cd "$2/apt/archives" && apt-get -q download cryptsetup-bin)
	local deb
	for deb in "$2"/apt/archives/*.deb; do dpkg-deb -x "$deb" "$2/tree"; done
	mkdir -p "$2/out/lib"
	find "$2/tree" -regex '.*/lib/[^/]*-linux-gnu/[^/]*\.so[^/]*' -exec cp -P -t "$2/out/lib" {} +
	cp "$2"/out/lib/ld-linux-*.so.* "$2/out/ld.so"
	find "$2/tree" -path '*/sbin/cryptsetup' -exec cp -t "$2/out" {} +
	"$2/out/ld.so" --library-path "$2/out/lib" "$2/out/cryptsetup" --version
	mkdir -p "$cache/cryptsetup-next"
	mv "$2/out" "$cache/cryptsetup-next/$1"
}

install_cryptsetup_next() {
	[ -e /usr/share/keyrings/debian-archive-keyring.gpg ] || debian debian-archive-keyring
	local suite
	for suite in "${cryptsetup_suites[@]}"; do
		[ -d "$cache/cryptsetup-next/$suite" ] && continue
		mkdir -p "$cache"
		work=$(mktemp -d "$cache/cryptsetup-next.XXXXXX")
		trap 'rm -rf "$work"' EXIT
		quietly "cryptsetup of $suite in .cache/cryptsetup-next" fetch_cryptsetup "$suite" "$work"
		rm -rf "$work"
	done
}

# fetch_image_packages unpacks the packages that a node's image has, by the
# Dockerfile, and those that crypt-worker is built with, and lists whose each file
# is. A shell is what every Debian has.
fetch_image_packages() { # ARCHITECTURE DIRECTORY to work in
	apt_of bookworm "$2/apt"
	sed 's/ bookworm main/ bookworm-updates main/; p; s,/debian bookworm-updates,/debian-security bookworm-security,' "$2/apt/sources.list" >"$2/apt/more"
	cat "$2/apt/more" >>"$2/apt/sources.list"
	echo "APT::Architecture \"$1\"; APT::Architectures { \"$1\"; };" >>"$2/apt/apt.conf"
	export APT_CONFIG=$2/apt/apt.conf
	apt-get -q update
	local deb name
	# shellcheck disable=SC2046 # words
	apt-get -qy --no-install-recommends --download-only install dash libcryptsetup-dev libdevmapper-dev \
		$(sed -n '/ AS node$/,/rm -rf/s/^ \{6\}\([a-z0-9.-]*\) .*/\1/p' "$root/Dockerfile")
	mkdir -p "$2/out/root" "$2/out/control"
	for deb in "$2"/apt/archives/*.deb; do
		name=$(dpkg-deb -f "$deb" Package)
		dpkg-deb -x "$deb" "$2/out/root"
		dpkg-deb -f "$deb" >"$2/out/control/$name"
		sha256sum "$deb" | sed 's/ .*//; s/^/X-SHA256: /' >>"$2/out/control/$name"
		dpkg-deb --fsys-tarfile "$deb" | tar -t | sed "s,^\.,$name\t,"
	done >"$2/out/files"
	mkdir -p "$cache/images"
	mv "$2/out" "$cache/images/$1"
}

install_images() {
	debian "${image_packages[@]}"
	local arch
	for arch in amd64 arm64; do
		[ -d "$cache/images/$arch" ] && continue
		mkdir -p "$cache"
		work=$(mktemp -d "$cache/images-$arch.XXXXXX")
		trap 'rm -rf "$work"' EXIT
		quietly "Debian's packages for $arch in .cache/images" fetch_image_packages "$arch" "$work"
		rm -rf "$work"
	done
}

install_tools() {
	debian shellcheck
	install_go
	local stamp
	stamp=$(go env GOVERSION && sha256sum <"$root/test/tools/go.mod")
	[ "$(cat "$root/.tools/stamp" 2>/dev/null)" = "$stamp" ] && return
	mkdir -p "$root/.tools"
	quietly "linters in .tools/bin" \
		env -C "$root/test/tools" GOFLAGS=-mod=readonly CGO_ENABLED=0 GOBIN="$root/.tools/bin" \
		go install -trimpath -ldflags '-s -w' tool
	printf '%s\n' "$stamp" >"$root/.tools/stamp"
}

# build_peer DIRECTORY builds the program of a module, or the tools that its
# go.mod names, or installs the npm packages of its lock file.
build_peer() {
	local name stamp
	name=$(basename "$1")
	stamp=$root/.tools/peer-$name
	[ "$(cat "$stamp" 2>/dev/null)" = "$(peer_hash "$1")" ] && return
	mkdir -p "$root/.tools/bin"
	if [ -e "$1/package-lock.json" ]; then
		rm -rf "$root/.tools/$name"
		mkdir -p "$root/.tools/$name"
		cp "$1/package.json" "$1/package-lock.json" "$root/.tools/$name/"
		quietly "$name in .tools/$name" env -C "$root/.tools/$name" npm ci --no-audit --no-fund --ignore-scripts
	elif [ -e "$1/main.go" ]; then
		quietly "$name in .tools/bin" env -C "$1" GOFLAGS=-mod=readonly CGO_ENABLED=0 \
			go build -trimpath -ldflags '-s -w' -o "$root/.tools/bin/$name" .
	else
		quietly "$name in .tools/bin" env -C "$1" GOFLAGS=-mod=readonly CGO_ENABLED=0 GOBIN="$root/.tools/bin" \
			go install -trimpath -ldflags '-s -w' tool
	fi
	peer_hash "$1" >"$stamp"
}

peer_hash() { (cd "$1" && go env GOVERSION && sha256sum -- *) | sha256sum; }

install_peers() { # NAME, or nothing for all
	debian "${peer_packages[@]}"
	command -v npm >/dev/null || debian nodejs npm # for azurite
	install_go
	local dir
	for dir in "$root"/test/peers/${1:-*}/; do
		[ -n "${1:-}" ] || [ ! -e "$dir/on-demand" ] || continue
		if [ -e "$dir/go.mod" ] || [ -e "$dir/package-lock.json" ]; then build_peer "$dir"; fi
	done
}

# build_e2e builds the programs of a module of test/e2e with a version in them.
build_e2e() { # MODULE VARIABLE=VERSION...
	local module=$root/test/e2e/$1 stamp=$root/.tools/e2e-$1 set=() v
	[ "$(cat "$stamp" 2>/dev/null)" = "$(peer_hash "$module")" ] && return
	for v in "${@:2}"; do set+=(-X "$v"); done
	mkdir -p "$root/.tools/bin"
	local what=(install tool)
	[ ! -e "$module/main.go" ] || what=(install .)
	quietly "$1 in .tools/bin" env -C "$module" GOFLAGS=-mod=readonly CGO_ENABLED=0 GOBIN="$root/.tools/bin" \
		nice -n 10 go "${what[0]}" -trimpath -ldflags "-s -w ${set[*]}" "${what[1]}"
	peer_hash "$module" >"$stamp"
}

install_e2e() {
	debian "${e2e_packages[@]}"
	install_images
	install_go
	local version=k8s.io/component-base/version
	build_e2e kubernetes $version.gitVersion=v1.36.3 $version.gitMajor=1 $version.gitMinor=36
	build_e2e sidecars main.version=v0.0.0-e2e
	# What a cluster has for snapshots, besides the driver's own sidecar.
	local snapshotter=github.com/kubernetes-csi/external-snapshotter crds controller
	crds=$(cd "$root/test/e2e/sidecars" && go list -mod=readonly -m -f '{{.Dir}}' $snapshotter/client/v8)
	controller=$(cd "$root/test/e2e/sidecars" && go list -mod=readonly -m -f '{{.Dir}}' $snapshotter/v8)
	rm -rf "$root/.tools/snapshot-crds" "$root/.tools/snapshot-controller"
	cp -r --no-preserve=mode "$crds/config/crd" "$root/.tools/snapshot-crds"
	cp -r --no-preserve=mode "$controller/deploy/kubernetes/snapshot-controller" "$root/.tools/snapshot-controller"
	# The release names the image of the one before it.
	sed -i 's/snapshot-controller:v8\.5\.0/snapshot-controller:v8.6.0/; s/replicas: 2/replicas: 1/' "$root"/.tools/snapshot-controller/setup-*.yaml
}

# build_storage builds Kubernetes' storage tests, and what their pods run.
build_storage() {
	cd "$root/test/e2e/storage"
	export GOFLAGS=-mod=readonly CGO_ENABLED=0
	nice -n 10 go build -trimpath -ldflags '-s -w' -o "$root/.tools/bin/agnhost" k8s.io/kubernetes/test/images/agnhost
	nice -n 10 go build -trimpath -ldflags '-s -w' -o "$root/.tools/bin/ginkgo" github.com/onsi/ginkgo/v2/ginkgo
	# Only what is called so is a program of tests to ginkgo.
	nice -n 10 go test -c -trimpath -ldflags '-s -w' -o "$root/.tools/bin/e2e-storage.test" .
}

install_storage() {
	install_go
	debian bash tar
	local stamp=$root/.tools/e2e-storage
	[ "$(cat "$stamp" 2>/dev/null)" = "$(peer_hash "$root/test/e2e/storage")" ] && return
	mkdir -p "$root/.tools/bin"
	quietly "Kubernetes' storage tests in .tools/bin" build_storage
	peer_hash "$root/test/e2e/storage" >"$stamp"
}

# build_previous builds the programs of the build before this one, with its tree
# beside them.
build_previous() { # DIRECTORY to work in
	git -C "$root" archive "$previous" | tar -x -C "$1"
	local p
	for p in csi-plugin key-service crypt-worker; do
		nice -n 10 env -C "$1" go build -trimpath -ldflags '-s -w' -o "bin/$p" "./cmd/$p"
	done
	echo "$previous" >"$1/commit"
	rm -rf "$root/.tools/previous"
	mv "$1" "$root/.tools/previous"
}

install_previous() {
	[ "$(cat "$root/.tools/previous/commit" 2>/dev/null)" = "$previous" ] && return
	install_go
	git -C "$root" cat-file -e "$previous^{commit}" 2>/dev/null ||
		fail "commit $previous, from which tests upgrade, is not in this clone: git fetch --unshallow"
	mkdir -p "$root/.tools"
	work=$(mktemp -d "$root/.tools/previous.XXXXXX")
	trap 'rm -rf "$work"' EXIT
	quietly "the build of ${previous:0:7} in .tools/previous" build_previous "$work"
}

[ $# -gt 0 ] || set -- packages go
for group; do
	case $group in
	packages) debian "${packages[@]}" ;;
	go)
		install_go
		install_modules
		;;
	qemu) install_qemu ;;
	peers) install_peers ;;
	peers=*) install_peers "${group#peers=}" ;;
	cryptsetup-next) install_cryptsetup_next ;;
	e2e) install_e2e ;;
	e2e-storage) install_storage ;;
	e2e-previous) install_previous ;;
	images) install_images ;;
	tools) install_tools ;;
	*) fail "no group $group; there are: packages go qemu peers cryptsetup-next e2e e2e-storage e2e-previous images tools" ;;
	esac
done
