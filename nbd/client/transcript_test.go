package client_test

import (
	"errors"
	"io"
	"net"
	"strings"
	"testing"

	"xapi-nbd/nbd"
	"xapi-nbd/nbd/client"
	"xapi-nbd/nbd/nbdtest"
	"xapi-nbd/nbd/wire"
)

// transcripts are played to the client, some of a correct server and some of an incorrect
// one. stage is where the client must fail; "" means that it must not. check reports whether
// the error is the right one.
var transcripts = []struct {
	file, stage string
	check       func(error) bool
	run         func(t *testing.T, nc net.Conn) (stage string, err error) // nil: runClient
}{
	{file: "go"},
	{file: "infos"},
	{file: "flags_future"},
	{file: "flags_offered"},
	{file: "greeting_foreign", stage: "greeting", check: isMagic},
	{file: "greeting_oldstyle", stage: "greeting", check: isMagic},
	{file: "greeting_short", stage: "greeting"},
	{file: "refused", stage: "refused", check: isRefusal(wire.RepErrUnknown, "not there")},
	{file: "refused_future", stage: "refused", check: isRefusal(1<<31|0xffff, "")},
	{file: "reply_magic", stage: "go", check: isMagic},
	{file: "reply_option", stage: "go"},
	{file: "reply_type", stage: "go"},
	{file: "reply_long", stage: "go"},
	{file: "ack_data", stage: "go"},
	{file: "ack_early", stage: "go", check: mentions("NBD_INFO_EXPORT")},
	{file: "info_short", stage: "go", check: func(err error) bool { return errors.Is(err, wire.ErrMalformed) }},
	{file: "no_flags", stage: "go"},
	{file: "read_error", stage: "read", check: func(err error) bool { return errors.Is(err, wire.EIO) }},
	{file: "read_error_future", stage: "read"},
	{file: "read_magic", stage: "read", check: isMagic},
	{file: "read_structured", stage: "read", check: isMagic},
	{file: "read_cookie", stage: "read"},
	{file: "read_lost", stage: "read"},
	{file: "structured", run: runExtensions},
	{file: "extended", run: runExtensions},
	{file: "exportname_zeroes", run: runExtensions},
	{file: "exportname_refused", stage: "go", run: runExtensions, check: func(err error) bool { return errors.Is(err, io.EOF) }},
	{file: "eshutdown", stage: "read", run: runExtensions, check: mentions("NBD_ESHUTDOWN: restart")},
}

func isMagic(err error) bool {
	var magic *wire.MagicError
	return errors.As(err, &magic)
}

func mentions(text string) func(error) bool {
	return func(err error) bool { return strings.Contains(err.Error(), text) }
}

func isRefusal(typ wire.OptionReply, text string) func(error) bool {
	return func(err error) bool {
		var refusal *client.Error
		return errors.As(err, &refusal) && refusal.Reply == typ && refusal.Text == text
	}
}

// runClient runs a whole session: greeting, GO, one READ, DISC. It returns the stage at which
// it failed.
func runClient(t *testing.T, nc net.Conn) (stage string, err error) {
	c, err := client.New(t.Context(), nc, &client.Config{NoStructured: true})
	if err != nil {
		nc.Close()
		return "greeting", err
	}
	conn, err := c.Go(t.Context(), "disk")
	var refusal *client.Error
	switch {
	case errors.As(err, &refusal):
		if aerr := c.Abort(); aerr != nil {
			t.Errorf("Abort: got error %v, want none", aerr)
		}
		return "refused", err
	case err != nil:
		nc.Close()
		return "go", err
	}
	defer conn.Close()
	if got := conn.Size(); got != 64<<10 {
		t.Errorf("size: got %d, want 64 KiB", got)
	}
	p := make([]byte, 16)
	if n, err := conn.ReadAt(p, 16); err != nil {
		if n != 0 {
			t.Errorf("ReadAt: got %d bytes beside error %v, want 0", n, err)
		}
		return "read", err
	}
	if got, want := string(p), "row 00000000001\n"; got != want {
		t.Errorf("ReadAt: got %q, want %q", got, want)
	}
	return "", nil
}

func TestTranscriptsClient(t *testing.T) {
	for _, tt := range transcripts {
		t.Run(tt.file, func(t *testing.T) {
			near, far := net.Pipe()
			defer near.Close()
			wait := nbdtest.PlayServer(t, far, nbdtest.LoadTranscript(t, "testdata/"+tt.file+".txt"))
			run := runClient
			if tt.run != nil {
				run = tt.run
			}
			stage, err := run(t, near)
			if stage != tt.stage {
				t.Errorf("ended at stage %q with error %v, want %q", stage, err, tt.stage)
			}
			if tt.check != nil && !tt.check(err) {
				t.Errorf("got error %v, which is not the right one", err)
			}
			wait()
		})
	}
}

// TestConnIsADevice reads a device through client and server.
func TestConnIsADevice(t *testing.T) {
	const seed = 7
	exports := &nbdtest.Exporter{Exports: map[string]func() (nbd.Device, error){
		"disk": func() (nbd.Device, error) { return nbdtest.NewMem(3<<20+512, seed), nil },
	}}
	dial := nbdtest.Serve(t, &nbd.Server{Exporter: exports})
	nbdtest.TestDevice(t, func() nbd.Device {
		c, err := client.New(t.Context(), dial(), nil)
		if err != nil {
			t.Fatal(err)
		}
		conn, err := c.Go(t.Context(), "disk")
		if err != nil {
			t.Fatal(err)
		}
		return conn
	})
	for _, o := range exports.Opens() {
		if err := o.Device.(*nbdtest.Mem).Misuse(); err != nil {
			t.Error(err)
		}
	}
}

// TestEveryTranscriptPlays finds files that no test names.
func TestEveryTranscriptPlays(t *testing.T) {
	played := make(map[string]bool)
	for _, tt := range transcripts {
		played[tt.file] = true
	}
	nbdtest.CheckPlayed(t, "testdata", played)
}
