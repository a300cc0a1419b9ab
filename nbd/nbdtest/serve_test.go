package nbdtest_test

import (
	"context"
	"crypto/tls"
	"errors"
	"testing"

	"xapi-nbd/nbd"
	"xapi-nbd/nbd/client"
	"xapi-nbd/nbd/nbdtest"
)

const session = `
	S: "NBDMAGIC" "IHAVEOPT" 0003
	C: 00000001
	C: "IHAVEOPT" 00000001 00000001 "x"
	S: 0000000000001000 ..*126
	C: 25609513 0000 0002 0000000000000000 0000000000000000 00000000
	S: eof`

func TestServe(t *testing.T) {
	exports := &nbdtest.Exporter{Exports: map[string]func() (nbd.Device, error){
		"x": func() (nbd.Device, error) { return nbdtest.NewMem(4096, 1), nil },
	}}
	t.Run("server", func(t *testing.T) {
		dial := nbdtest.Serve(t, &nbd.Server{Exporter: exports})
		for range 3 {
			nbdtest.Play(t, dial(), parse(t, session))
		}
		dial() // not closed: the end of the test does
	})
	opens := exports.Opens()
	if len(opens) != 3 {
		t.Fatalf("got %d opens, want 3", len(opens))
	}
	for i, o := range opens {
		m := o.Device.(*nbdtest.Mem)
		if o.Name != "x" || o.Err != nil || o.Peer.Remote == nil || m.Closes() != 1 || m.Misuse() != nil {
			t.Errorf("open %d: got %+v, closed %d times, misuse %v", i, o, m.Closes(), m.Misuse())
		}
	}
}

func TestPipe(t *testing.T) {
	m := nbdtest.NewMem(4096, 1)
	exports := nbdtest.Single("x", m)
	client, wait := nbdtest.Pipe(t, &nbd.Server{Exporter: exports})
	nbdtest.Play(t, client, parse(t, session))
	if err := wait(); err != nil {
		t.Errorf("ServeConn: got error %v, want none", err)
	}
	if m.Closes() != 1 {
		t.Errorf("device closed %d times, want once", m.Closes())
	}
}

func TestExporterRefuses(t *testing.T) {
	e := nbdtest.Single("x", nbdtest.NewMem(0, 0))
	d, err := e.Open(t.Context(), nbd.Peer{ID: "7"}, "y")
	if d != nil || !errors.Is(err, nbd.ErrUnknownExport) {
		t.Errorf("got %v and error %v, want ErrUnknownExport", d, err)
	}
	if got := e.Opens(); len(got) != 1 || got[0].Name != "y" || got[0].Peer.ID != "7" || !errors.Is(got[0].Err, nbd.ErrUnknownExport) {
		t.Errorf("got %+v, want the one call", got)
	}
}

func TestTLS(t *testing.T) {
	serverTLS, clientTLS := nbdtest.TLS(t)
	dial := nbdtest.Serve(t, &nbd.Server{
		Exporter: nbdtest.Single("x", nbdtest.NewMem(4096, 1)), TLSConfig: serverTLS,
		TLSPolicy: func(context.Context, nbd.Peer) (nbd.TLSMode, error) { return nbd.ForcedTLS, nil },
	})
	c, err := client.New(t.Context(), dial(), &client.Config{TLSConfig: clientTLS})
	if err != nil {
		t.Fatal(err)
	}
	conn, err := c.Go(t.Context(), "x")
	if err != nil {
		t.Fatal(err)
	}
	if err := conn.Close(); err != nil {
		t.Errorf("Close: got error %v, want none", err)
	}

	wrong := clientTLS.Clone()
	wrong.ServerName = "somebody.else"
	_, err = client.New(t.Context(), dial(), &client.Config{TLSConfig: wrong})
	var verify *tls.CertificateVerificationError
	if !errors.As(err, &verify) {
		t.Errorf("wrong name: got error %v, want a CertificateVerificationError", err)
	}
}
