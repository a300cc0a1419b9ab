package interop

import (
	"context"
	"crypto/tls"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"xapi-nbd/nbd"
	"xapi-nbd/nbd/nbdtest"
)

// export is a name in the form of VDI.get_nbd_info.
const export = "/7a2e0c5e-0000-4000-8000-000000000001?session_id=OpaqueRef:91c40000-0000-4000-8000-000000000002"

// dialoguesOf is the name of the peer whose dialogues are played.
const dialoguesOf = "peer: the original, as recorded dialogues"

// rowsSize is the size of the disk in the dialogues. Each of its rows of 16 bytes contains its
// offset.
const rowsSize = 64 << 10

func rows() []byte {
	var b []byte
	for i := range rowsSize / 16 {
		b = fmt.Appendf(b, "row %011d\n", i)
	}
	return b
}

func load(t *testing.T, file string) nbdtest.Transcript {
	t.Helper()
	return nbdtest.LoadTranscript(t, filepath.Join("testdata", file+".txt"))
}

// lister is an exporter that lists its exports.
type lister struct {
	nbd.Exporter
	exports []nbd.Export
}

func (l lister) List(context.Context, nbd.Peer) ([]nbd.Export, error) { return l.exports, nil }

// clientDialogues are the bytes of clients of the original, played to our server.
var clientDialogues = []struct {
	file   string
	lists  bool
	mode   nbd.TLSMode
	opened bool // an export was
}{
	{file: "client_pull", opened: true},
	{file: "client_errors", opened: true},
	{file: "client_vanishes", opened: true},
	{file: "client_writable", opened: true},
	{file: "client_haggling"},
	{file: "client_list", lists: true},
	{file: "client_list_refused"},
	{file: "client_abort"},
	{file: "client_abort_no_wait"},
	{file: "client_unknown_export"},
	{file: "client_tls_required", mode: nbd.ForcedTLS},
	{file: "client_tls_required_oldclient", mode: nbd.ForcedTLS},
}

// dialogueServer returns our server with the disk of the dialogues. The test fails at its end
// if the server has not closed every device that it opened.
func dialogueServer(t *testing.T, mode nbd.TLSMode, lists, opened bool) (s *nbd.Server, clientTLS *tls.Config) {
	disk := nbdtest.MemOf(rows())
	ram := nbdtest.NewRAM(rows())
	exports := &nbdtest.Exporter{Exports: map[string]func() (nbd.Device, error){
		export:     func() (nbd.Device, error) { return disk, nil },
		"writable": func() (nbd.Device, error) { return ram, nil },
	}}
	t.Cleanup(func() {
		if err := disk.Misuse(); err != nil {
			t.Error(err)
		}
		if got := disk.Closes()+ram.Closes() == 1; got != opened {
			t.Errorf("a device was opened and closed once: %v, want %v", got, opened)
		}
	})
	s = &nbd.Server{Exporter: exports}
	if lists {
		s.Exporter = lister{exports, []nbd.Export{{Name: "export1"}, {Name: "export2", Description: "the other disk"}}}
	}
	if mode != nbd.NoTLS {
		s.TLSConfig, clientTLS = nbdtest.TLS(t)
		s.TLSPolicy = func(context.Context, nbd.Peer) (nbd.TLSMode, error) { return mode, nil }
	}
	return s, clientTLS
}

func TestDialoguesOfClients(t *testing.T) {
	t.Run("original as dialogue", func(t *testing.T) {
		t.Run("its client", func(t *testing.T) {
			for _, tt := range clientDialogues {
				t.Run(strings.TrimPrefix(tt.file, "client_"), func(t *testing.T) {
					t.Log(dialoguesOf)
					s, _ := dialogueServer(t, tt.mode, tt.lists, tt.opened)
					nbdtest.Play(t, nbdtest.Serve(t, s)(), load(t, tt.file))
				})
			}
			t.Run("tls", dialogueOfTLSClient)
		})
	})
}

func dialogueOfTLSClient(t *testing.T) {
	t.Log(dialoguesOf)
	s, clientTLS := dialogueServer(t, nbd.ForcedTLS, false, true)
	nc := nbdtest.Serve(t, s)()
	nbdtest.Play(t, nc, load(t, "client_tls_upgrade"))
	secure := tls.Client(nc, likeTheOriginal(clientTLS))
	if err := secure.HandshakeContext(t.Context()); err != nil {
		t.Fatal(err)
	}
	nbdtest.Play(t, secure, load(t, "client_tls_inside"))
}

// TestEveryDialoguePlays: a test uses every file in testdata.
func TestEveryDialoguePlays(t *testing.T) {
	played := map[string]bool{
		"client_tls_upgrade": true, "client_tls_inside": true,
		"server_tls_upgrade": true, "server_tls_inside": true,
	}
	for _, tt := range clientDialogues {
		played[tt.file] = true
	}
	for _, tt := range serverDialogues {
		played[tt.file] = true
	}
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no dialogues: %v", err)
	}
	for _, f := range files {
		if !played[strings.TrimSuffix(filepath.Base(f), ".txt")] {
			t.Errorf("%s is not played", f)
		}
	}
}
