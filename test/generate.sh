#!/usr/bin/env bash
# Generates Go code from the .proto files given, relative to the module's root,
# with the generators that go.mod and test/tools/go.mod pin. protoc is Debian's.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
test/install.sh packages tools
protoc --plugin="protoc-gen-go=.tools/bin/protoc-gen-go" --plugin="protoc-gen-go-grpc=.tools/bin/protoc-gen-go-grpc" \
	--go_out=. --go_opt=module=github.com/cryptcsi/cryptcsi \
	--go-grpc_out=. --go-grpc_opt=module=github.com/cryptcsi/cryptcsi "$@"
# The version of protoc differs between machines, and nothing depends on it.
sed -i '/^\/\/ - protoc  *v\|^\/\/ \tprotoc  *v/d' "${@/%.proto/.pb.go}" "${@/%.proto/_grpc.pb.go}"
