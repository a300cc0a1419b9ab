package tls

import (
	cryptotls "crypto/tls"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"sync"
	"time"
)

// Reloader serves the certificate of one file and follows its replacement.
//
// It has no goroutine and no watch: a watch on the old inode sees nothing of a
// rename, and one stat per handshake costs microseconds next to the signature
// that the handshake needs anyway. A file that cannot be used never takes the
// service's certificate away: the last good one is served until a better comes.
//
// All methods may be called concurrently.
type Reloader struct {
	path string
	log  *slog.Logger

	mu   sync.Mutex             // guards everything below, and is held while the file is read
	cert *cryptotls.Certificate // the last good one, nil before there was any
	seen fs.FileInfo            // the file that cert or err came from, nil when it could not be read
	err  error                  // of the last attempt; nil when cert is what the file holds
}

// NewReloader loads path for the first time. The error is that of this first
// load; the Reloader is usable either way and tries again at the next call.
// A nil log discards.
func NewReloader(path string, log *slog.Logger) (*Reloader, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	r := &Reloader{path: path, log: log}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.refresh()
	return r, r.err
}

// GetCertificate returns the current certificate; it is meant for
// crypto/tls.Config.GetCertificate. Without a usable one it fails with the
// reason, and so does the handshake. The result must not be modified.
func (r *Reloader) GetCertificate(*cryptotls.ClientHelloInfo) (*cryptotls.Certificate, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.refresh()
	if r.cert == nil {
		return nil, fmt.Errorf("no usable certificate: %w", r.err)
	}
	return r.cert, nil
}

// Available returns nil when there is a certificate to serve, else the reason
// why there is none. It looks at the file, so a certificate that has appeared
// meanwhile is found.
func (r *Reloader) Available() error {
	_, err := r.GetCertificate(nil)
	return err
}

// refresh reads the file if it is not the one seen last. r.mu is held.
func (r *Reloader) refresh() {
	if r.seen != nil {
		fi, err := os.Stat(r.path)
		if err == nil && sameFile(r.seen, fi) {
			return
		}
	}
	data, fi, err := readFile(r.path)
	if err != nil {
		// Not remembered as seen: a missing file, wrong permissions or a
		// failing disk may be put right without any trace in inode, mtime and
		// size, so each handshake tries again.
		r.failed(nil, err)
		return
	}
	cert, leftOut, err := parseFile(r.path, data)
	if err != nil {
		r.failed(fi, err)
		return
	}
	r.cert, r.seen, r.err = cert, fi, nil
	r.loaded(leftOut)
}

// sameFile reports whether nothing was replaced or rewritten between the two
// looks: device and inode, modification time, size.
func sameFile(a, b fs.FileInfo) bool {
	return os.SameFile(a, b) && a.ModTime().Equal(b.ModTime()) && a.Size() == b.Size()
}

// failed records an attempt that gave no certificate and logs it once: not
// again for the same file (which is not even read again), nor for the same
// reason when there was no file to remember.
func (r *Reloader) failed(seen fs.FileInfo, err error) {
	repeated := seen == nil && r.seen == nil && r.err != nil && r.err.Error() == err.Error()
	r.seen, r.err = seen, err
	if repeated {
		return
	}
	if r.cert != nil {
		r.log.Error("certificate cannot be reloaded, still serving the previous one", "err", err)
		return
	}
	r.log.Error("certificate cannot be loaded", "err", err)
}

func (r *Reloader) loaded(leftOut []error) {
	leaf := r.cert.Leaf
	log := r.log.With("certfile", r.path, "subject", leaf.Subject.String(), "not_after", leaf.NotAfter)
	log.Info("certificate loaded", "chain", len(r.cert.Certificate))
	for _, err := range leftOut {
		log.Warn("part of the certificate chain is left out", "err", err)
	}
	switch now := time.Now(); {
	case now.After(leaf.NotAfter):
		log.Warn("certificate has expired, verifying clients will refuse it")
	case now.Before(leaf.NotBefore):
		log.Warn("certificate is not valid yet, verifying clients will refuse it", "not_before", leaf.NotBefore)
	}
}
