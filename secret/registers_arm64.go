package secret

// clearRegisters clears the vector registers.
func clearRegisters()
