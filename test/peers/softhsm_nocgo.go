//go:build !cgo

package peers

// finalize does nothing: a process without cgo has not loaded a module.
func finalize(string) {}
