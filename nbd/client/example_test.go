package client_test

import (
	"context"
	"fmt"
	"log"
	"net"
	"time"

	"xapi-nbd/nbd"
	"xapi-nbd/nbd/client"
	"xapi-nbd/nbd/nbdtest"
	"xapi-nbd/nbd/wire"
)

// exampleServer serves a disk in memory, which begins with content and is 1 MiB long, until
// stop is called.
func exampleServer(content string) (uri string, stop func()) {
	disk := make([]byte, 1<<20)
	copy(disk, content)
	ram := nbdtest.NewRAM(disk)
	s := &nbd.Server{Exporter: &nbdtest.Exporter{Exports: map[string]func() (nbd.Device, error){
		"disk": func() (nbd.Device, error) { return ram.Again(), nil },
	}}}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(context.Background(), l) }()
	return fmt.Sprintf("nbd://%s/disk", l.Addr()), func() {
		if err := s.Shutdown(context.Background()); err != nil {
			log.Fatal(err)
		}
		<-ended
	}
}

// open opens the export of a URI, and asks for the metadata context base:allocation.
func open(ctx context.Context, uri string) (*client.Conn, error) {
	u, err := client.ParseURI(uri)
	if err != nil {
		return nil, err
	}
	c, err := client.DialURI(ctx, u, &client.Config{MetaContexts: []string{wire.BaseAllocation}})
	if err != nil {
		return nil, err
	}
	conn, err := c.Go(ctx, u.Export)
	if err != nil {
		c.Abort()
		return nil, err
	}
	return conn, nil
}

// Read the beginning of an export.
func Example() {
	uri, stop := exampleServer("hello, disk")
	defer stop()
	ctx := context.Background()

	u, err := client.ParseURI(uri)
	if err != nil {
		log.Fatal(err)
	}
	c, err := client.DialURI(ctx, u, nil)
	if err != nil {
		log.Fatal(err)
	}
	conn, err := c.Go(ctx, u.Export)
	if err != nil {
		c.Abort()
		log.Fatal(err)
	}
	defer conn.Close()

	p := make([]byte, 11)
	if err := conn.Read(ctx, p, 0); err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%d bytes, which begin with %q\n", conn.Size(), p)
	// Output: 1048576 bytes, which begin with "hello, disk"
}

// Print which parts of an export have data.
func ExampleConn_Extents() {
	uri, stop := exampleServer("hello, disk")
	defer stop()
	ctx := context.Background()

	conn, err := open(ctx, uri)
	if err != nil {
		log.Fatal(err)
	}
	defer conn.Close()

	off := uint64(0)
	for e, err := range conn.Extents(ctx, wire.BaseAllocation, 0, conn.Size()) {
		if err != nil {
			log.Fatal(err)
		}
		kind := "data"
		if e.Status&wire.StateZero != 0 {
			kind = "zeroes"
		}
		fmt.Printf("%d bytes at %d: %s\n", e.Length, off, kind)
		off += e.Length
	}
	// Output:
	// 512 bytes at 0: data
	// 1048064 bytes at 512: zeroes
}

// Copy an export to another one, and zero the parts that the source knows to be zeroes
// instead of reading them.
func Example_copy() {
	from, stop := exampleServer("hello, disk")
	defer stop()
	to, stopOther := exampleServer("something else")
	defer stopOther()
	ctx := context.Background()

	src, err := open(ctx, from)
	if err != nil {
		log.Fatal(err)
	}
	defer src.Close()
	dst, err := open(ctx, to)
	if err != nil {
		log.Fatal(err)
	}
	defer dst.Close()

	if err := copyExport(ctx, dst, src); err != nil {
		log.Fatal(err)
	}
	p := make([]byte, 14)
	if err := dst.Read(ctx, p, 0); err != nil {
		log.Fatal(err)
	}
	fmt.Printf("the copy begins with %q\n", p)
	// Output: the copy begins with "hello, disk\x00\x00\x00"
}

func copyExport(ctx context.Context, dst, src *client.Conn) error {
	buf := make([]byte, 1<<20)
	off := int64(0)
	for e, err := range src.Extents(ctx, wire.BaseAllocation, 0, src.Size()) {
		if err != nil {
			return err
		}
		end := off + int64(e.Length)
		if e.Status&wire.StateZero != 0 {
			if err := dst.WriteZeroes(ctx, off, end-off, client.ZeroOptions{}); err != nil {
				return err
			}
			off = end
		}
		for off < end {
			p := buf[:min(int64(len(buf)), end-off)]
			if err := src.Read(ctx, p, off); err != nil {
				return err
			}
			if err := dst.Write(ctx, p, off, false); err != nil {
				return err
			}
			off += int64(len(p))
		}
	}
	return dst.Flush(ctx)
}

// Read an export over two connections, which are made again for a minute when they are lost.
func ExampleNewPool() {
	uri, stop := exampleServer("hello, disk")
	defer stop()
	ctx := context.Background()

	pool, err := client.NewPool(ctx, client.PoolConfig{
		Open:        func(ctx context.Context) (*client.Conn, error) { return open(ctx, uri) },
		Connections: 2,
		RetryFor:    time.Minute,
		Lost:        func(err error) { log.Print(err) },
	})
	if err != nil {
		log.Fatal(err)
	}
	defer pool.Close()

	p := make([]byte, 11)
	if err := pool.Read(ctx, p, 0); err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%q over %d connections\n", p, pool.Connections())
	// Output: "hello, disk" over 2 connections
}
