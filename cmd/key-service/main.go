// Command key-service keeps the keys of encrypted volumes. This package only
// wires: flags, then values, then what the verbs call.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"

	"github.com/cryptcsi/cryptcsi/envelope/stores"
	"github.com/cryptcsi/cryptcsi/internal/config"
	"github.com/cryptcsi/cryptcsi/internal/keyconfig"
	"github.com/cryptcsi/cryptcsi/internal/logging"
	"github.com/cryptcsi/cryptcsi/kms/all"
	"github.com/cryptcsi/cryptcsi/secret"
)

// Set by the linker, see Makefile.
var (
	version = "dev"
	commit  = "unknown"
)

const usage = `key-service keeps the keys of encrypted volumes.

  key-service serve              answer nodes, controllers and operators over gRPC
  key-service unseal             give a service that was started with --sealed its KMS and store
  key-service status             how a service is
  key-service recover            give a node that waits for the key of a device KMS and store to get it from

  key-service certificate        make and renew the service's authority and certificate, in Secrets of the cluster
  key-service secret create      make a random secret that records depend on (a master secret), in a Secret, once

  key-service check              try all that serving needs of KMS and store, and say what is missing

  key-service kek create         make the key-encryption key that --kms-uri names
  key-service kek describe       what the KMS says of it
  key-service kek versions       its versions, and how many records each holds
  key-service kek rotate         make a new version (then: key-service rewrap)
  key-service kek retire         disable old versions that no record refers to
  key-service kek keep-alive     label it as in use now
  key-service kek list           the KEKs of all clusters in the same place, with their last use
  key-service kek prune          disable KEKs of clusters that are gone

  key-service store create       make the bucket, container or namespace that --storage-uri names

  key-service dek list           the records in the store
  key-service dek create ID      make the key of a static volume
  key-service dek delete ID      destroy a volume's key
  key-service dek restore ID     take a deletion back, within --delete-grace
  key-service dek release ID     let another node format what a dead one has claimed
  key-service rewrap [ID...]     wrap keys under the KEK's current version
  key-service prune              destroy what deleted volumes' grace has kept, and keys of volumes that are gone

  key-service version            print version, commit, and the KMS and stores that this build knows
  key-service <verb> --help      list the flags of a verb

Verbs that change something for good show what they would do, and do it with --yes.
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// verbs by name; those of two words by both.
func verbs() map[string]func(context.Context, *command) error {
	return map[string]func(context.Context, *command) error{
		"serve":          serve,
		"unseal":         unseal,
		"status":         status,
		"recover":        recoverNode,
		"certificate":    certificate,
		"secret create":  randomSecret,
		"check":          check,
		"kek create":     kekCreate,
		"kek describe":   kekDescribe,
		"kek versions":   kekVersions,
		"kek rotate":     kekRotate,
		"kek retire":     kekRetire,
		"kek keep-alive": kekKeepAlive,
		"kek list":       kekList,
		"kek prune":      kekPrune,
		"store create":   storeCreate,
		"dek list":       dekList,
		"dek create":     dekCreate,
		"dek delete":     dekDelete,
		"dek restore":    dekRestore,
		"dek release":    dekRelease,
		"rewrap":         rewrap,
		"prune":          prune,
		"version":        printVersion,
	}
}

// run picks the verb and the exit code: 0 done, 1 failed, 2 wrong usage.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	name, rest := split(args)
	if name == "help" || name == "h" {
		fmt.Fprint(stdout, usage)
		return 0
	}
	verb, ok := verbs()[name]
	if !ok {
		fmt.Fprint(stderr, usage)
		if name != "" {
			fmt.Fprintf(stderr, "key-service: unknown verb %q\n", name)
		}
		return 2
	}
	err := verb(ctx, newCommand(name, rest, stdout, stderr))
	var wrong usageError
	switch {
	case err == nil, errors.Is(err, flag.ErrHelp), errors.Is(err, errOnlyChecked):
		return 0
	case errors.As(err, &wrong):
		fmt.Fprintf(stderr, "key-service: %v\n", err)
		return 2
	default:
		fmt.Fprintf(stderr, "key-service: %v\n", err)
		return 1
	}
}

// split takes the verb, of one word or two, from the arguments.
func split(args []string) (name string, rest []string) {
	if len(args) == 0 {
		return "", nil
	}
	name, rest = strings.TrimLeft(args[0], "-"), args[1:]
	if slices.Contains([]string{"kek", "store", "dek", "secret"}, name) && len(rest) > 0 {
		return name + " " + rest[0], rest[1:]
	}
	return name, rest
}

// usageError is a command line that cannot be.
type usageError string

func (e usageError) Error() string { return string(e) }

// errOnlyChecked ends a verb that was to check its configuration.
var errOnlyChecked = errors.New("the configuration is right")

// command is one call of a verb: its flags, and where it prints.
type command struct {
	*flag.FlagSet
	args           []string
	stdout, stderr io.Writer

	file    config.File
	logging logging.Flags
	keys    keyconfig.Flags
	log     *slog.Logger
}

func newCommand(name string, args []string, stdout, stderr io.Writer) *command {
	c := &command{FlagSet: flag.NewFlagSet(name, flag.ContinueOnError), args: args, stdout: stdout, stderr: stderr}
	c.SetOutput(stderr)
	c.Usage = func() {
		fmt.Fprintf(stderr, "Usage of key-service %s:\n", name)
		c.PrintDefaults()
	}
	return c
}

// parse adds the flags that all verbs have, and reads command line and file.
// The verb takes least to most arguments.
func (c *command) parse(least, most int) error {
	c.file.Add(c.FlagSet)
	c.logging.Add(c.FlagSet)
	c.keys.Add(c.FlagSet)
	if err := c.Parse(c.args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return err
		}
		return usageError(c.Name() + ": " + err.Error())
	}
	if err := c.file.Load(c.FlagSet); err != nil {
		return usageError(c.Name() + ": " + err.Error())
	}
	if n := c.NArg(); n < least || n > most {
		return usageError(fmt.Sprintf("%s: %d arguments, %d to %d are expected", c.Name(), n, least, most))
	}
	log, err := c.logging.Logger(c.stderr)
	if err != nil {
		return usageError(c.Name() + ": " + err.Error())
	}
	c.log = log
	return nil
}

// open is parse, then it opens what the flags name.
func (c *command) open(ctx context.Context, least, most int) (*keyconfig.Keys, error) {
	like := c.Int("like-process", 0, "process ID of a key-service serve, 1 in its container: KMS, stores and what goes with them are as its flags say")
	if err := c.parse(least, most); err != nil {
		return nil, err
	}
	if *like != 0 {
		if err := c.likeProcess(*like); err != nil {
			return nil, err
		}
	}
	if kek, _ := c.keys.Given(); !kek && !strings.HasPrefix(c.Name(), "store ") {
		return nil, usageError(c.Name() + ": --kms-uri (or --kms-uri-file) is required")
	}
	if err := secret.Harden(); err != nil {
		return nil, err
	}
	keys, err := c.keys.Open(ctx, keyconfig.Options{}, c.log)
	if err != nil {
		return nil, err
	}
	if c.file.Check {
		if err := errors.Join(keys.Err(), keys.Close()); err != nil {
			return nil, err
		}
		fmt.Fprintln(c.stdout, errOnlyChecked)
		return nil, errOnlyChecked
	}
	return keys, nil
}

func printVersion(_ context.Context, c *command) error {
	if err := c.parse(0, 0); err != nil {
		return err
	}
	fmt.Fprintf(c.stdout, "key-service %s, commit %s, KMS: %s, stores: %s\n", version, commit,
		strings.Join(all.Usable(), ", "), strings.Join(slices.Sorted(maps.Keys(stores.Mux())), ", "))
	return nil
}
