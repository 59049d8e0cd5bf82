// Package keyservicev1 is the key service's API as gRPC has it, generated from
// keyservice.proto.
package keyservicev1

//go:generate ../../../test/generate.sh api/keyservice/v1/keyservice.proto
