package secret

import "golang.org/x/sys/cpu"

// clearRegisters clears the vector registers that Go's code uses.
func clearRegisters() {
	if cpu.X86.HasAVX {
		clearWide()
	} else {
		clearSSE()
	}
}

func clearWide()
func clearSSE()
