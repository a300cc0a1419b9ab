package nbd_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"sync"

	"xapi-nbd/internal/testcert"
	"xapi-nbd/nbd"
	"xapi-nbd/nbd/client"
)

// listen listens on a free port. A program would listen on ":10809".
func listen() net.Listener {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	return l
}

// beginning reads the first bytes of an export.
func beginning(addr net.Addr, name string, cfg *client.Config) string {
	c, err := client.Dial(context.Background(), "tcp", addr.String(), cfg)
	if err != nil {
		log.Fatal(err)
	}
	conn, err := c.Go(context.Background(), name)
	if err != nil {
		c.Abort()
		return err.Error()
	}
	defer conn.Close()
	p := make([]byte, 5)
	if err := conn.Read(context.Background(), p, 0); err != nil {
		log.Fatal(err)
	}
	return string(p)
}

// Serve the content of a bytes.Reader, read-only, under every name.
func ExampleServer() {
	content := bytes.NewReader([]byte("hello, world"))
	s := &nbd.Server{Exporter: nbd.ExporterFunc(func(context.Context, nbd.Peer, string) (nbd.Device, error) {
		return nbd.DeviceOf(content), nil
	})}
	l := listen()
	go s.Serve(context.Background(), l)
	defer s.Shutdown(context.Background())

	fmt.Println(beginning(l.Addr(), "anything", nil))
	// Output: hello
}

// An exporter of two names, which clients can list. All other names are refused.
type twoDisks map[string]nbd.SizedReaderAt

func (d twoDisks) Open(_ context.Context, _ nbd.Peer, name string) (nbd.Device, error) {
	content, ok := d[name]
	if !ok {
		return nil, nbd.Refuse(nbd.ErrUnknownExport, "there is no disk with that name", nil)
	}
	return nbd.DeviceOf(content), nil
}

func (d twoDisks) List(context.Context, nbd.Peer) ([]nbd.Export, error) {
	return []nbd.Export{{Name: "first"}, {Name: "second", Description: "the other one"}}, nil
}

// Serve two disks, which clients can list.
func ExampleExporter() {
	s := &nbd.Server{Exporter: twoDisks{
		"first":  bytes.NewReader([]byte("first disk")),
		"second": bytes.NewReader([]byte("other disk")),
	}}
	l := listen()
	go s.Serve(context.Background(), l)
	defer s.Shutdown(context.Background())

	fmt.Println(beginning(l.Addr(), "second", nil))
	fmt.Println(beginning(l.Addr(), "third", nil))
	// Output:
	// other
	// NBD_OPT_GO: server answered NBD_REP_ERR_UNKNOWN: there is no disk with that name
}

// memory is a disk in memory that can be written to. All connections share it, so Close
// does nothing.
type memory struct {
	mu      sync.RWMutex
	content []byte
}

func (m *memory) Size() int64  { return int64(len(m.content)) }
func (m *memory) Close() error { return nil }

func (m *memory) ReadAt(p []byte, off int64) (int, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if n := copy(p, m.content[off:]); n < len(p) {
		return n, io.EOF
	}
	return len(p), nil
}

// WriteAt makes it an nbd.Writer.
func (m *memory) WriteAt(p []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return copy(m.content[off:], p), nil
}

// WritesThrough says that nothing needs to be flushed, so that FLUSH and FUA are offered.
func (m *memory) WritesThrough() bool { return true }

// MultiConn says that all connections see the same content.
func (m *memory) MultiConn() bool { return true }

// Serve a disk in memory that clients can write to.
func ExampleWriter() {
	disk := &memory{content: make([]byte, 1<<20)}
	s := &nbd.Server{Exporter: nbd.ExporterFunc(func(context.Context, nbd.Peer, string) (nbd.Device, error) {
		return disk, nil
	})}
	l := listen()
	go s.Serve(context.Background(), l)
	defer s.Shutdown(context.Background())

	ctx := context.Background()
	c, err := client.Dial(ctx, "tcp", l.Addr().String(), nil)
	if err != nil {
		log.Fatal(err)
	}
	conn, err := c.Go(ctx, "disk")
	if err != nil {
		log.Fatal(err)
	}
	if err := conn.Write(ctx, []byte("hello, disk"), 0, true); err != nil {
		log.Fatal(err)
	}
	conn.Close()
	fmt.Println(beginning(l.Addr(), "disk", nil))
	// Output: hello
}

// Serve with TLS only: a client in the clear is refused.
func ExampleServer_tls() {
	cert := testcert.SelfSigned("localhost")
	s := &nbd.Server{
		Exporter:  twoDisks{"first": bytes.NewReader([]byte("first disk"))},
		TLSConfig: cert.ServerConfig(), // a tls.Config with Certificates and MinVersion
		TLSPolicy: func(context.Context, nbd.Peer) (nbd.TLSMode, error) { return nbd.ForcedTLS, nil },
	}
	l := listen()
	go s.Serve(context.Background(), l)
	defer s.Shutdown(context.Background())

	fmt.Println(beginning(l.Addr(), "first", &client.Config{TLSConfig: cert.ClientConfig("localhost")}))
	fmt.Println(beginning(l.Addr(), "first", nil))
	// Output:
	// first
	// NBD_OPT_GO: server answered NBD_REP_ERR_TLS_REQD: send NBD_OPT_STARTTLS first
}
