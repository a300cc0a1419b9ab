package tls

import (
	"bytes"
	"crypto"
	"crypto/rsa"
	cryptotls "crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
)

// maxFileSize bounds what is read of the certificate file. A 4096-bit key with
// a chain of ten certificates is about 25 KiB; anything near 1 MiB is not a
// certificate file, and it is read at a peer's request.
const maxFileSize = 1 << 20

// minRSABits is what crypto/rsa signs with at all: a smaller key would load and
// then fail every handshake, where only the log of a peer could say why.
const minRSABits = 1024

// Defects of a certificate file. They stay unexported: nobody decides anything
// by them, they exist so that each defect has one clear text.
var (
	errNotRegular    = errors.New("not a regular file")
	errTooLarge      = fmt.Errorf("larger than %d bytes", maxFileSize)
	errEmpty         = errors.New("the file is empty")
	errNoPEM         = errors.New("the file holds no PEM block")
	errDamaged       = errors.New("the file holds a damaged or truncated PEM block")
	errNoKey         = errors.New("the file holds no private key")
	errEncryptedKey  = errors.New("the private key is encrypted; a service cannot ask for a passphrase")
	errBadKey        = errors.New("the private key cannot be parsed")
	errWeakKey       = fmt.Errorf("the RSA key has fewer than %d bits", minRSABits)
	errNoCertificate = errors.New("the file holds no certificate")
	errBadCert       = errors.New("cannot be parsed")
	errMismatch      = errors.New("the private key does not belong to the first certificate")
)

// LoadKeyPair reads a private key and its certificate chain from one PEM file,
// as xapi writes it: key first, then the leaf, then what else is to be sent.
//
// The key may be PKCS#8, PKCS#1 ("RSA PRIVATE KEY") or SEC 1 ("EC PRIVATE KEY").
// Other blocks (files from older releases carry DH PARAMETERS), CRLF line ends
// and text between the blocks are skipped. The first certificate is the leaf.
//
// An expired certificate loads: whether that matters is for the client to
// decide, which may pin this very leaf. The error names path and the defect and
// never quotes the file.
func LoadKeyPair(path string) (*cryptotls.Certificate, error) {
	data, _, err := readFile(path)
	if err != nil {
		return nil, err
	}
	return parseFile(path, data)
}

// readFile returns the file's content and what fstat said of that very file
// before the read, so that a replacement in between is noticed next time.
func readFile(path string) ([]byte, fs.FileInfo, error) {
	// Looked at before it is opened: opening a FIFO would wait for a writer.
	fi, err := os.Stat(path)
	if err != nil {
		return nil, nil, fmt.Errorf("certificate: %w", err)
	}
	if !fi.Mode().IsRegular() {
		return nil, fi, fmt.Errorf("certificate %s: %w", path, errNotRegular)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, fi, fmt.Errorf("certificate: %w", err)
	}
	defer f.Close()
	opened, err := f.Stat()
	if err != nil {
		return nil, fi, fmt.Errorf("certificate: %w", err)
	}
	data, err := io.ReadAll(io.LimitReader(f, maxFileSize+1))
	if err != nil {
		return nil, opened, fmt.Errorf("certificate: %w", err)
	}
	return data, opened, nil
}

// parseFile is parse with the path in front of its errors.
func parseFile(path string, data []byte) (*cryptotls.Certificate, error) {
	cert, err := parse(data)
	if err != nil {
		return nil, fmt.Errorf("certificate %s: %w", path, err)
	}
	return cert, nil
}

func parse(data []byte) (*cryptotls.Certificate, error) {
	switch {
	case len(data) > maxFileSize:
		return nil, errTooLarge
	case len(bytes.TrimSpace(data)) == 0:
		return nil, errEmpty
	}
	blocks, err := decode(data)
	if err != nil {
		return nil, err
	}
	key, err := privateKey(blocks)
	if err != nil {
		return nil, err
	}
	cert := &cryptotls.Certificate{PrivateKey: key}
	for _, b := range blocks {
		if b.Type != "CERTIFICATE" {
			continue
		}
		c, err := x509.ParseCertificate(b.Bytes)
		if err != nil {
			return nil, fmt.Errorf("certificate %d %w: %w", len(cert.Certificate)+1, errBadCert, err)
		}
		if cert.Leaf == nil {
			cert.Leaf = c
		}
		cert.Certificate = append(cert.Certificate, b.Bytes)
	}
	if cert.Leaf == nil {
		return nil, errNoCertificate
	}
	public, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !public.Equal(cert.Leaf.PublicKey) {
		return nil, errMismatch
	}
	return cert, nil
}

// decode returns all PEM blocks in their order. encoding/pem passes over a
// block it cannot decode as if it were text; here that would silently drop the
// end of a file that is still being written, so begin lines are counted.
func decode(data []byte) ([]*pem.Block, error) {
	begins := 0
	for line := range bytes.Lines(data) {
		if bytes.HasPrefix(line, []byte("-----BEGIN ")) {
			begins++
		}
	}
	var blocks []*pem.Block
	for {
		block, rest := pem.Decode(data)
		if block == nil {
			break
		}
		blocks = append(blocks, block)
		data = rest
	}
	switch {
	case begins == 0:
		return nil, errNoPEM
	case len(blocks) != begins:
		return nil, fmt.Errorf("%w (%d of %d are whole)", errDamaged, len(blocks), begins)
	}
	return blocks, nil
}

// privateKey parses the first private key block. What the parser says about a
// broken key is dropped on purpose: its texts quote lengths and tags that were
// read from the key.
func privateKey(blocks []*pem.Block) (crypto.Signer, error) {
	for _, b := range blocks {
		var key any
		var err error
		switch b.Type {
		case "ENCRYPTED PRIVATE KEY":
			return nil, errEncryptedKey
		case "PRIVATE KEY", "RSA PRIVATE KEY", "EC PRIVATE KEY":
			// RFC 1421, "Proc-Type Field": how OpenSSL marks a key that it
			// encrypted in the traditional format.
			if strings.Contains(b.Headers["Proc-Type"], "ENCRYPTED") {
				return nil, errEncryptedKey
			}
			key, err = parseKey(b)
		default:
			continue
		}
		if err != nil {
			return nil, errBadKey
		}
		signer, ok := key.(crypto.Signer)
		if !ok { // X25519 in PKCS#8: a key, but not one that signs
			return nil, errBadKey
		}
		if r, ok := key.(*rsa.PrivateKey); ok && r.N.BitLen() < minRSABits {
			return nil, errWeakKey
		}
		return signer, nil
	}
	return nil, errNoKey
}

func parseKey(b *pem.Block) (any, error) {
	switch b.Type {
	case "RSA PRIVATE KEY":
		return x509.ParsePKCS1PrivateKey(b.Bytes)
	case "EC PRIVATE KEY":
		return x509.ParseECPrivateKey(b.Bytes)
	default:
		return x509.ParsePKCS8PrivateKey(b.Bytes)
	}
}
