package nbd_test

import (
	"errors"
	"io"
	"net"
	"strings"
	"testing"

	"xapi-nbd/nbd"
	"xapi-nbd/nbd/nbdtest"
	"xapi-nbd/nbd/wire"
)

// clientTranscripts play a server, good or bad, against the client. stage is
// where the client must notice; "" means that all is well. check tells whether
// its error is the right one, if it is one in particular.
var clientTranscripts = []struct {
	file, stage string
	check       func(error) bool
	run         func(t *testing.T, nc net.Conn) (stage string, err error) // nil: runClient
}{
	{file: "client_go"},
	{file: "client_infos"},
	{file: "client_flags_future"},
	{file: "client_flags_offered"},
	{file: "client_greeting_foreign", stage: "greeting", check: isMagic},
	{file: "client_greeting_oldstyle", stage: "greeting", check: isMagic},
	{file: "client_greeting_short", stage: "greeting"},
	{file: "client_refused", stage: "refused", check: isRefusal(wire.RepErrUnknown, "not there")},
	{file: "client_refused_future", stage: "refused", check: isRefusal(1<<31|0xffff, "")},
	{file: "client_reply_magic", stage: "go", check: isMagic},
	{file: "client_reply_option", stage: "go"},
	{file: "client_reply_type", stage: "go"},
	{file: "client_reply_long", stage: "go"},
	{file: "client_ack_data", stage: "go"},
	{file: "client_ack_early", stage: "go", check: mentions("NBD_INFO_EXPORT")},
	{file: "client_info_short", stage: "go", check: func(err error) bool { return errors.Is(err, wire.ErrMalformed) }},
	{file: "client_no_flags", stage: "go"},
	{file: "client_read_error", stage: "read", check: func(err error) bool { return errors.Is(err, wire.EIO) }},
	{file: "client_read_error_future", stage: "read"},
	{file: "client_read_magic", stage: "read", check: isMagic},
	{file: "client_read_structured", stage: "read", check: isMagic},
	{file: "client_read_cookie", stage: "read"},
	{file: "client_read_lost", stage: "read"},
	{file: "client_structured", run: runExtensions},
	{file: "client_extended", run: runExtensions},
	{file: "client_exportname_zeroes", run: runExtensions},
	{file: "client_exportname_refused", stage: "go", run: runExtensions, check: func(err error) bool { return errors.Is(err, io.EOF) }},
	{file: "client_eshutdown", stage: "read", run: runExtensions, check: mentions("NBD_ESHUTDOWN: restart")},
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
		var refusal *nbd.Error
		return errors.As(err, &refusal) && refusal.Reply == typ && refusal.Text == text
	}
}

// runClient goes through a whole session: greet, GO, one READ, DISC. It says
// how far it came.
func runClient(t *testing.T, nc net.Conn) (stage string, err error) {
	c, err := nbd.NewClient(t.Context(), nc, &nbd.ClientConfig{NoStructured: true})
	if err != nil {
		nc.Close()
		return "greeting", err
	}
	conn, err := c.Go(t.Context(), "disk")
	var refusal *nbd.Error
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
	if got := conn.Size(); got != rowsSize {
		t.Errorf("size: got %d, want %d", got, rowsSize)
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
	for _, tt := range clientTranscripts {
		t.Run(tt.file, func(t *testing.T) {
			client, server := net.Pipe()
			defer client.Close()
			wait := nbdtest.PlayServer(t, server, load(t, tt.file))
			run := runClient
			if tt.run != nil {
				run = tt.run
			}
			stage, err := run(t, client)
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

// TestConnIsADevice: what is read through client and server is what the
// device holds.
func TestConnIsADevice(t *testing.T) {
	const seed = 7
	exports := &nbdtest.Exporter{Exports: map[string]func() (nbd.Device, error){
		"disk": func() (nbd.Device, error) { return nbdtest.NewMem(3<<20+512, seed), nil },
	}}
	dial := nbdtest.Serve(t, &nbd.Server{Exporter: exports})
	nbdtest.TestDevice(t, func() nbd.Device {
		c, err := nbd.NewClient(t.Context(), dial(), nil)
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
