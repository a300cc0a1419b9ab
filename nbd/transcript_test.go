package nbd_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"xapi-nbd/nbd"
	"xapi-nbd/nbd/nbdtest"
	"xapi-nbd/nbd/wire"
)

// serverTranscript is a transcript for the server. hard is set if the connection ends without
// ABORT or DISC.
type serverTranscript struct {
	file  string
	opens []string // exports that the server asked for
	hard  bool
}

var (
	disk       = []string{"disk"}
	plain      = []string{"plain"}
	ram        = []string{"ram"}
	sparseDisk = []string{"sparse"}
)

// serverTranscripts are all there are but those of the client; prefixes of
// their names say in which TLS mode they play.
var serverTranscripts = []serverTranscript{
	{file: "greeting"},
	{file: "flags_unknown", hard: true},
	{file: "flags_unknown_high", hard: true},
	{file: "exportname_zeroes", opens: disk},
	{file: "exportname_nozeroes", opens: disk},
	{file: "exportname_oldclient", opens: disk},
	{file: "exportname_oldclient_zeroes", opens: disk},
	{file: "exportname_default", opens: []string{""}},
	{file: "exportname_unknown", opens: []string{"nothing"}, hard: true},
	{file: "exportname_refused", opens: []string{"secret"}, hard: true},
	{file: "exportname_too_long", hard: true},
	{file: "exportname_after_options", opens: []string{"nothing", "disk"}},
	{file: "go", opens: disk},
	{file: "go_infos", opens: disk},
	{file: "go_default_sizes", opens: plain},
	{file: "go_again", opens: []string{"nothing", "secret", "broken", "disk"}},
	{file: "info_then_go", opens: disk},
	{file: "info_then_go_other", opens: []string{"disk", "nothing", "plain"}},
	{file: "info_then_abort", opens: disk},
	{file: "info_malformed", opens: disk},
	{file: "list"},
	{file: "list_data"},
	{file: "option_unknown", opens: disk},
	{file: "option_bad_magic", hard: true},
	{file: "option_too_long", opens: disk},
	{file: "option_absurd", hard: true},
	{file: "options_at_once", opens: disk},
	{file: "option_longest", opens: []string{strings.Repeat("n", wire.MaxString)}},
	{file: "abort"},
	{file: "abort_data"},
	{file: "starttls_notls", opens: disk},
	{file: "forcedtls_options"},
	{file: "forcedtls_exportname", hard: true},
	{file: "forcedtls_abort"},
	{file: "forcedtls_starttls_data"},
	{file: "forcedtls_oldclient", hard: true},
	{file: "forcedtls_plaintext", hard: true},
	{file: "selectivetls_clear", opens: disk},
	{file: "read", opens: disk},
	{file: "read_past_end", opens: disk},
	{file: "read_flags", opens: disk},
	{file: "read_empty", opens: disk},
	{file: "read_error", opens: []string{"faulty"}},
	{file: "read_unaligned_served", opens: disk},
	{file: "read_unaligned_refused", opens: disk},
	{file: "read_unaligned_after_info", opens: disk},
	{file: "write_refused", opens: disk},
	{file: "trim_refused", opens: disk},
	{file: "command_unsupported", opens: disk},
	{file: "disc", opens: disk},
	{file: "disc_in_flight", opens: disk},
	{file: "request_bad_magic", opens: disk, hard: true},
	{file: "request_extended", opens: disk, hard: true},
	{file: "structured_read", opens: disk},
	{file: "structured_data", opens: disk},
	{file: "structured_twice", opens: disk},
	{file: "structured_info_go", opens: disk},
	{file: "structured_exportname", opens: disk},
	{file: "structured_read_error", opens: []string{"faulty"}},
	{file: "structured_df", opens: sparseDisk},
	{file: "structured_holes", opens: sparseDisk},
	{file: "structured_holes_simple", opens: sparseDisk},
	{file: "structured_refused", opens: disk},
	{file: "structured_write", opens: ram},
	{file: "structured_extended_request", opens: disk, hard: true},
	{file: "meta_list", opens: []string{"disk", "nothing"}},
	{file: "meta_list_selects_nothing", opens: disk},
	{file: "meta_list_keeps_selection", opens: disk},
	{file: "meta_set_early", opens: disk},
	{file: "meta_set_early_selects_nothing", opens: disk},
	{file: "meta_set", opens: disk},
	{file: "meta_set_nothing", opens: disk},
	{file: "meta_set_again", opens: []string{"plain", "disk"}},
	{file: "meta_set_other", opens: []string{"plain", "disk"}},
	{file: "meta_set_unknown", opens: []string{"disk", "nothing", "disk"}},
	{file: "meta_malformed", opens: disk},
	{file: "meta_malformed_replaces", opens: disk},
	{file: "meta_too_long", opens: disk},
	{file: "status_plain", opens: disk},
	{file: "status_sparse", opens: sparseDisk},
	{file: "status_no_context", opens: disk},
	{file: "status_ram", opens: ram},
	{file: "extended_read", opens: disk},
	{file: "extended_holes", opens: sparseDisk},
	{file: "extended_read_error", opens: []string{"faulty"}},
	{file: "extended_options", opens: disk},
	{file: "extended_exportname", opens: disk},
	{file: "extended_status", opens: sparseDisk},
	{file: "extended_status_no_context", opens: disk},
	{file: "extended_payload", opens: ram},
	{file: "extended_write", opens: ram},
	{file: "extended_write_refused", opens: disk},
	{file: "extended_payload_absurd", opens: disk, hard: true},
	{file: "extended_compact_request", opens: disk, hard: true},
	{file: "write_ram", opens: ram},
	{file: "write_trim", opens: ram},
	{file: "write_zeroes", opens: ram},
	{file: "write_zeroes_slow", opens: []string{"slow"}},
	{file: "write_past_end", opens: ram},
	{file: "write_flags", opens: ram},
	{file: "write_plain", opens: []string{"writable"}},
	{file: "write_empty", opens: ram},
	{file: "write_error", opens: []string{"worn"}},
	{file: "write_unaligned", opens: ram},
	{file: "write_infos", opens: ram},
	{file: "write_commands_at_once", opens: ram},
	{file: "cache_readonly", opens: []string{"cached"}},
	{file: "readonly_capable", opens: []string{"sealed"}},
}

// tlsTranscripts play under TLS, after tls_upgrade.
var tlsTranscripts = []serverTranscript{
	{file: "tls_inside", opens: []string{"nothing", "disk"}},
	{file: "tls_exportname", opens: disk},
	{file: "tls_abort"},
}

func load(t *testing.T, file string) nbdtest.Transcript {
	t.Helper()
	return nbdtest.LoadTranscript(t, filepath.Join("testdata", file+".txt"))
}

// newServer serves the rows in the TLS mode of the prefix of the transcript's name.
func newServer(t *testing.T, file string) (*nbd.Server, *rowsExports, *tls.Config) {
	t.Helper()
	exports := newRowsExports()
	s := &nbd.Server{Exporter: exports}
	mode := nbd.NoTLS
	switch prefix, _, _ := strings.Cut(file, "_"); prefix {
	case "forcedtls", "tls":
		mode = nbd.ForcedTLS
	case "selectivetls":
		mode = nbd.SelectiveTLS
	default:
		return s, exports, nil
	}
	serverTLS, clientTLS := nbdtest.TLS(t)
	s.TLSConfig = serverTLS
	s.TLSPolicy = func(context.Context, nbd.Peer) (nbd.TLSMode, error) { return mode, nil }
	return s, exports, clientTLS
}

// checkEnd expects how ServeConn ended.
func checkEnd(t *testing.T, err error, hard bool) {
	t.Helper()
	switch {
	case !hard && err != nil:
		t.Errorf("ServeConn: got error %v, want none", err)
	case hard && !errors.Is(err, net.ErrClosed):
		t.Errorf("ServeConn: got error %v, want one that matches net.ErrClosed", err)
	}
}

func TestTranscriptsPipe(t *testing.T) {
	for _, tt := range serverTranscripts {
		t.Run(tt.file, func(t *testing.T) {
			s, exports, _ := newServer(t, tt.file)
			client, wait := nbdtest.Pipe(t, s)
			nbdtest.Play(t, client, load(t, tt.file))
			checkEnd(t, wait(), tt.hard)
			exports.check(t, tt.opens)
		})
	}
}

// TestTranscriptsTCP runs the transcripts over sockets, which split and join writes.
func TestTranscriptsTCP(t *testing.T) {
	for _, tt := range serverTranscripts {
		t.Run(tt.file, func(t *testing.T) {
			s, exports, _ := newServer(t, tt.file)
			t.Run("connection", func(t *testing.T) {
				nbdtest.Play(t, nbdtest.Serve(t, s)(), load(t, tt.file))
			})
			exports.check(t, tt.opens) // the server is shut down now
		})
	}
}

// TestTranscriptsBytewise: messages may arrive byte by byte.
func TestTranscriptsBytewise(t *testing.T) {
	for _, tt := range serverTranscripts {
		t.Run(tt.file, func(t *testing.T) {
			s, exports, _ := newServer(t, tt.file)
			client, server := net.Pipe()
			wait := nbdtest.ServeConn(t, s, client, bytewise{server})
			nbdtest.Play(t, client, load(t, tt.file))
			checkEnd(t, wait(), tt.hard)
			exports.check(t, tt.opens)
		})
	}
}

// bytewise is a connection whose reads return one byte each.
type bytewise struct{ net.Conn }

func (c bytewise) Read(p []byte) (int, error) { return c.Conn.Read(p[:min(len(p), 1)]) }

func TestTranscriptsTLS(t *testing.T) {
	for _, tt := range tlsTranscripts {
		t.Run(tt.file, func(t *testing.T) {
			s, exports, clientTLS := newServer(t, tt.file)
			client, wait := nbdtest.Pipe(t, s)
			nbdtest.Play(t, client, load(t, "tls_upgrade"))
			secure := tls.Client(client, clientTLS)
			if err := secure.HandshakeContext(t.Context()); err != nil {
				t.Fatal(err)
			}
			nbdtest.Play(t, secure, load(t, tt.file))
			checkEnd(t, wait(), tt.hard)
			exports.check(t, tt.opens)
		})
	}
}

// recorder records the bytes of each call of Write.
type recorder struct {
	net.Conn
	mu     sync.Mutex // guards writes
	writes [][]byte
}

func (r *recorder) Write(p []byte) (int, error) {
	r.mu.Lock()
	r.writes = append(r.writes, bytes.Clone(p))
	r.mu.Unlock()
	return r.Conn.Write(p)
}

// TestOneWritePerMessage checks that each reply is sent with one write: some clients read a
// reply with one call.
func TestOneWritePerMessage(t *testing.T) {
	tests := []struct {
		file string
		want []int // lengths of the server's writes
	}{
		{"exportname_zeroes", []int{18, 8 + 2 + 124, 16 + 16}},
		{"exportname_nozeroes", []int{18, 8 + 2, 16 + 16}},
		{"go", []int{18, 20 + 12 + 20, 16 + 16}},
		{"go_infos", []int{18, 20 + 12 + 20 + 6 + 20 + 14 + 20 + 14 + 20, 16 + 512}},
		{"read_empty", []int{18, 20 + 12 + 20, 16, 16, 16, 16 + 16}},
	}
	for _, tt := range tests {
		t.Run(tt.file, func(t *testing.T) {
			s, _, _ := newServer(t, tt.file)
			client, server := net.Pipe()
			rec := &recorder{Conn: server}
			wait := nbdtest.ServeConn(t, s, client, rec)
			nbdtest.Play(t, client, load(t, tt.file))
			wait()
			var got []int
			for _, b := range rec.writes {
				got = append(got, len(b))
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("bytes per write: got %v, want %v", got, tt.want)
			}
		})
	}
}

// TestNextOptionWhileOpening: while an export is being opened the server
// listens whether its client is still there. If the next option comes in
// instead, not a byte of it is lost.
func TestNextOptionWhileOpening(t *testing.T) {
	s, exports, _ := newServer(t, "options_at_once")
	client, server := net.Pipe()
	listener := &oneByteReads{Conn: server, got: make(chan struct{}, 1)}
	open := exports.Exports["disk"]
	exports.Exports["disk"] = func() (nbd.Device, error) {
		<-listener.got
		return open()
	}
	wait := nbdtest.ServeConn(t, s, client, listener)
	nbdtest.Play(t, client, load(t, "options_at_once"))
	checkEnd(t, wait(), false)
	exports.check(t, disk)
}

// oneByteReads reports when a read with room for one byte has got it.
type oneByteReads struct {
	net.Conn
	got chan struct{}
}

func (c *oneByteReads) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if len(p) == 1 && n == 1 {
		select {
		case c.got <- struct{}{}:
		default:
		}
	}
	return n, err
}

// TestEveryTranscriptPlays: every transcript file is used by a test.
func TestEveryTranscriptPlays(t *testing.T) {
	played := map[string]bool{"tls_upgrade": true}
	for _, tt := range slices.Concat(serverTranscripts, tlsTranscripts) {
		played[tt.file] = true
	}
	nbdtest.CheckPlayed(t, "testdata", played)
}
