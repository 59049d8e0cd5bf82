// Package constellationv1 is the call that Edgeless Constellation's key
// service answers, generated from constellation.proto, so that what was made
// for that service can be served.
package constellationv1

//go:generate ../../../test/generate.sh api/constellation/v1/constellation.proto
