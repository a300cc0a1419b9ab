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

// Reloader serves the certificate of one file and reloads it when the file is replaced.
//
// It has no goroutine and no inotify watch: one stat per handshake costs microseconds beside
// the signature that the handshake needs anyway. While the file is missing or invalid the
// last valid certificate is served.
//
// All methods may be called concurrently.
type Reloader struct {
	path string
	log  *slog.Logger

	mu   sync.Mutex             // guards the fields below; held while the file is read
	cert *cryptotls.Certificate // the last valid one, nil if there was none
	seen fs.FileInfo            // the file of cert or err, nil if it could not be read
	err  error                  // of the last attempt; nil if cert is the file's
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

// GetCertificate returns the current certificate, for crypto/tls.Config.GetCertificate. If
// there is none it returns the reason. The result must not be modified.
func (r *Reloader) GetCertificate(*cryptotls.ClientHelloInfo) (*cryptotls.Certificate, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.refresh()
	if r.cert == nil {
		return nil, fmt.Errorf("no usable certificate: %w", r.err)
	}
	return r.cert, nil
}

// Available returns nil if there is a certificate to serve, else the reason. It checks the
// file, so it finds a certificate that has appeared since the last call.
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
		// Not recorded as seen: a missing file, wrong permissions or a failing disk may be
		// repaired without a change of inode, mtime and size, so each handshake tries again.
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

// sameFile reports whether device, inode, modification time and size are the same.
func sameFile(a, b fs.FileInfo) bool {
	return os.SameFile(a, b) && a.ModTime().Equal(b.ModTime()) && a.Size() == b.Size()
}

// failed records a failed load and logs it once: not again for the same file, nor for the
// same reason if there is no file.
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
