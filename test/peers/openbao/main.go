// Command openbao is the OpenBao server: the real peer of kms/transit with
// policies, logins and seal.
package main

import (
	"os"

	"github.com/openbao/openbao/command"
)

func main() { os.Exit(command.Run(os.Args[1:])) }
