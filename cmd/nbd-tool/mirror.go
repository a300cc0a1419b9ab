package main

import (
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"xapi-nbd/mirror"
)

// defaultStall is how long clients wait for the secondary.
const defaultStall = 2 * time.Second

// mirrorOptions are the flags of mirror.
type mirrorOptions struct {
	serve             serveOptions // those of bindServer
	connect           connectFlags
	primaryFile       string // --primary-uri-file
	secondaryFile     string // --secondary-uri-file
	control           string // unix:/path
	state             string // a file
	onError           string
	connections       int
	stall, retryFor   time.Duration
	rate              byteRate
	destinationIsZero bool
	daemon, progress  bool
}

func newMirrorCommand(std streams) *cobra.Command {
	var o mirrorOptions
	cmd := &cobra.Command{
		Use:   "mirror [flags] PRIMARY SECONDARY",
		Short: "Serve a disk and copy it to another one while it is written",
		Long: `Serve the disk PRIMARY as an NBD export, and copy it to SECONDARY meanwhile, with all
that clients write. When both are equal, "nbd-tool ctl" completes the mirror: clients go on
on SECONDARY, or are disconnected. PRIMARY and SECONDARY are NBD URIs, files or block
devices of the same size; --primary-uri-file and --secondary-uri-file stand in their place.
A file that does not exist is made as SECONDARY. All writes to PRIMARY must go through the
mirror: it does not see others.

For disks of virtual machines that use NBD, such as those of QEMU. The disk of a running VM of
XenServer or XCP-ng goes through tapdisk and not through NBD; it is moved by a warm
migration.

First everything is copied in the background, and what is written meanwhile is copied again.
When little is left, or it does not become less, writes are answered when both ends have
them. If SECONDARY takes longer than --stall for one, the client is answered
and the range is copied later. Clients read from PRIMARY, and flush PRIMARY.

The ends are locked: a file by flock(2) and fcntl(2), which QEMU uses too, a block device against
being mounted or opened exclusively. Refused before anything is written are the same disk at both ends, unequal
sizes, block sizes of which neither divides the other, and a SECONDARY that is read-only or
in use.

A lost connection to either end is made again, with growing pauses, for as long as
--retry-for says; what SECONDARY had not flushed is copied again. When PRIMARY may have lost
writes that clients had not flushed, the next flush of each client fails. When SECONDARY
fails for good:
  --on-error detach  serves clients on without SECONDARY, which is incomplete
  --on-error stop    refuses further writes

Control: --control unix:/path makes a socket for "nbd-tool ctl", which only root and the user
of this process can use. Without it the mirror can be stopped, but not completed. The
protocol is one JSON object on a line for each request and reply, see "nbd-tool ctl".

With --daemon the command goes to the background when it serves, with exit code 0; if that
fails, it ends with the error and its exit code. Later messages go to standard error if
that is a file, and else are lost: "nbd-tool ctl PATH status" has the last error.

A mirror that ends without having been completed leaves PRIMARY intact and SECONDARY
worthless, even if little was missing. With --state FILE the ranges that may differ are kept
in FILE, and the same command goes on with these if it was interrupted, even by a loss of
power. A block device is recognized by the disk behind it, for example by a serial number; one
that has none only until the next boot. It cannot know of writes to PRIMARY or SECONDARY that did not go through the mirror: after
such writes remove FILE, so that everything is copied.

The last line of the output says whether SECONDARY is complete. Exit codes: 0 if it is,
1 if it is not, 2 for usage.

--exportname, --no-tls, --port and URIs such as file:///path are those of the original
nbd-tool, and its --ciphersuites and --curve are accepted and ignored.

Signals:
  SIGINT, SIGTERM  cancel the mirror, let requests end for up to 10 seconds, and exit with
                   code 1, or 0 if it was completed before; a second one ends the process
                   at once
  SIGHUP           is ignored: the mirror outlives its terminal`,
		Example: `  nbd-tool mirror --listen unix:/run/disk.sock --control unix:/run/mirror.ctl disk.img nbds://host/disk
  nbd-tool mirror --daemon --state mirror.state --control unix:/run/mirror.ctl nbd://one/disk nbd://two/disk
  nbd-tool ctl /run/mirror.ctl wait
  nbd-tool ctl /run/mirror.ctl complete --pivot --verify`,
		DisableFlagsInUseLine: true,
		Args: func(_ *cobra.Command, args []string) error {
			want := 2
			for _, file := range []string{o.primaryFile, o.secondaryFile} {
				if file != "" {
					want--
				}
			}
			if len(args) != want {
				return usagef("want PRIMARY and SECONDARY, or flags in their place")
			}
			return nil
		},
		RunE: action(func(cmd *cobra.Command, args []string) error {
			if err := o.check(cmd.Flags()); err != nil {
				return err
			}
			if o.daemon && !isDaemon() {
				return startDaemon(cmd.Context())
			}
			return o.run(cmd, args, std)
		}),
	}
	o.bind(cmd.Flags())
	return cmd
}

func (o *mirrorOptions) bind(f *pflag.FlagSet) {
	f.SortFlags = false
	o.serve.bindServer(f)
	f.StringVar(&o.control, "control", "", "make a socket at `unix:/path` for nbd-tool ctl")
	f.BoolVar(&o.daemon, "daemon", false, "go to the background when clients are served")
	f.StringVar(&o.state, "state", "", "keep in `FILE` which ranges may differ, and go on with these if it exists")
	f.StringVar(&o.onError, "on-error", "detach", "when SECONDARY fails: `ACTION` is detach or stop")
	f.DurationVar(&o.stall, "stall", defaultStall, "`DURATION` for which a write waits for SECONDARY before its client is answered")
	f.DurationVar(&o.retryFor, "retry-for", defaultRetry, "`DURATION` for which a lost connection is made again; 0 is not at all")
	f.Lookup("retry-for").DefValue = strings.TrimSuffix(defaultRetry.String(), "0s") // help says 1m
	f.Var(&o.rate, "rate-limit", "copy at most `BYTES` per second, such as 50M; 0 is no limit. Writes of clients are not limited")
	f.BoolVar(&o.destinationIsZero, "destination-is-zero", false, "trust that SECONDARY reads as zeroes all over; wrong data if it does not")
	f.IntVar(&o.connections, "connections", defaultConnections, "`N` connections to each server that promises consistency between them")
	f.BoolVar(&o.progress, "progress", false, "write lines about the progress; on a terminal there is one without it")
	bindURIFile(f, "primary-uri-file", &o.primaryFile, " of PRIMARY")
	bindURIFile(f, "secondary-uri-file", &o.secondaryFile, " of SECONDARY")
	o.connect.bind(f)
}

// check returns an error for flags that are invalid or do not fit together.
func (o *mirrorOptions) check(f *pflag.FlagSet) error {
	if err := o.serve.check(f); err != nil {
		return err
	}
	switch {
	case o.control != "" && controlPath(o.control) == "":
		return usagef("--control is unix:/path")
	case o.onError != "detach" && o.onError != "stop":
		return usagef("--on-error is detach or stop")
	case o.connections < 1 || o.connections > maxConnections:
		return usagef("--connections is 1 to %d", maxConnections)
	case o.stall <= 0:
		return usagef("--stall must be above 0, such as 2s")
	case o.retryFor < 0:
		return usagef("--retry-for must be 0 or more, such as 60s")
	case o.primaryFile == "-" && o.secondaryFile == "-":
		return usagef("standard input can hold only one URI")
	}
	return o.connect.check()
}

// controlPath returns the path of unix:/path, or "".
func controlPath(addr string) string {
	path, _ := strings.CutPrefix(addr, "unix:")
	if path == addr {
		return ""
	}
	return path
}

// errorPolicy returns what happens when the secondary fails.
func (o *mirrorOptions) errorPolicy() mirror.OnError {
	if o.onError == "stop" {
		return mirror.Stop
	}
	return mirror.Detach
}
