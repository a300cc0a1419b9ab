package tls

import (
	"bytes"
	"crypto/ecdh"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestLoadKeyPair(t *testing.T) {
	rsaLeaf, ecLeaf := validCert(rsaKey(), "host"), validCert(ecKey(), "host")
	issuer := validCert(newECKey(elliptic.P384()), "issuer")
	pkcs1 := pemBlock("RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(rsaKey()))
	_, edKey, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	dhParams := pemBlock("DH PARAMETERS", []byte{0x30, 0x03, 0x02, 0x01, 0x02})
	plain := join(pkcs8(t, rsaKey()), rsaLeaf, issuer)

	tests := []struct {
		name  string
		data  []byte
		chain int
	}{
		{"PKCS#8 RSA", join(pkcs8(t, rsaKey()), rsaLeaf), 1},
		{"PKCS#1", join(pkcs1, rsaLeaf), 1},
		{"PKCS#8 EC", join(pkcs8(t, ecKey()), ecLeaf), 1},
		{"SEC 1", join(sec1(t, ecKey()), ecLeaf), 1},
		{"SEC 1 after its parameters", join(pemBlock("EC PARAMETERS", []byte{5, 0}), sec1(t, ecKey()), ecLeaf), 1},
		{"Ed25519", join(pkcs8(t, edKey), validCert(edKey, "host")), 1},
		{"chain", plain, 2},
		{"DH PARAMETERS last", join(plain, dhParams), 2},
		{"unknown blocks between", join(pkcs1, dhParams, rsaLeaf, pemBlock("X509 CRL", []byte{1}), issuer), 2},
		{"CRLF", bytes.ReplaceAll(plain, []byte("\n"), []byte("\r\n")), 2},
		{"text between", join([]byte("key -----BEGIN here"), pkcs1, []byte("subject=CN = host\n"), rsaLeaf, []byte("issuer\n"), issuer), 2},
		{"no final newline", bytes.TrimSpace(plain), 2},
		{"key last", join(rsaLeaf, pkcs1), 1},
		{"expired", join(pkcs1, certFor(rsaKey(), "host", time.Now().Add(-time.Hour))), 1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			cert, _, err := LoadKeyPair(writeFile(t, tt.data))
			if err != nil {
				t.Fatalf("LoadKeyPair: %v", err)
			}
			if got := len(cert.Certificate); got != tt.chain {
				t.Errorf("got %d certificates, want %d", got, tt.chain)
			}
			if got := cert.Leaf.Subject.CommonName; got != "host" {
				t.Errorf("got leaf %q, want host", got)
			}
			if !bytes.Equal(cert.Certificate[0], cert.Leaf.Raw) {
				t.Error("the first certificate is not the leaf")
			}
		})
	}
}

func TestLoadKeyPairErrors(t *testing.T) {
	leaf, key := validCert(rsaKey(), "host"), pkcs8(t, rsaKey())
	good := join(key, leaf)
	damagedKey, _ := pem.Decode(key)
	traditional := pem.EncodeToMemory(&pem.Block{
		Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(rsaKey()),
		Headers: map[string]string{"Proc-Type": "4,ENCRYPTED", "DEK-Info": "AES-128-CBC,00"},
	})
	agreement, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}

	tests := []struct {
		name string
		data []byte
		want error
	}{
		{"empty", nil, errEmpty},
		{"blank", []byte("\n\r\n  "), errEmpty},
		{"garbage", []byte("this is no certificate\x00\xff"), errNoPEM},
		{"DER", damagedKey.Bytes, errNoPEM},
		{"no key", leaf, errNoKey},
		{"only parameters", pemBlock("DH PARAMETERS", []byte{1}), errNoKey},
		{"no certificate", key, errNoCertificate},
		{"encrypted PKCS#8", join(pemBlock("ENCRYPTED PRIVATE KEY", []byte{1}), leaf), errEncryptedKey},
		{"encrypted traditional", join(traditional, leaf), errEncryptedKey},
		{"broken key", join(pemBlock("PRIVATE KEY", damagedKey.Bytes[:100]), leaf), errBadKey},
		{"key of another format", join(pemBlock("EC PRIVATE KEY", damagedKey.Bytes), leaf), errBadKey},
		{"key that does not sign", join(pkcs8(t, agreement), leaf), errBadKey},
		{"broken certificate", join(key, pemBlock("CERTIFICATE", []byte{0x30, 0x01})), errBadCert},
		{"mismatch", join(key, validCert(ecKey(), "host")), errMismatch},
		{"mismatch of the same kind", join(pkcs8(t, newECKey(elliptic.P256())), validCert(ecKey(), "host")), errMismatch},
		{"issuer before the leaf", join(key, validCert(ecKey(), "issuer"), leaf), errMismatch},
		{"certificate cut off", good[:len(good)-100], errDamaged},
		{"leaf cut off before its chain", join(key, leaf[:200], leaf), errDamaged},
		{"key cut off", join(key[:200], leaf), errDamaged},
		{"too large", append(good, bytes.Repeat([]byte(" "), maxFileSize)...), errTooLarge},
	}
	texts := map[error]string{}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			path := writeFile(t, tt.data)
			cert, _, err := LoadKeyPair(path)
			if !errors.Is(err, tt.want) {
				t.Fatalf("got %v, %v, want an error that is %q", cert, err, tt.want)
			}
			if !strings.Contains(err.Error(), path) {
				t.Errorf("error %q does not name the file", err)
			}
			checkNoKey(t, err.Error(), key)
			texts[tt.want] = tt.want.Error()
		})
	}
	distinct := map[string]bool{}
	for _, text := range texts {
		if distinct[text] {
			t.Errorf("two defects share the text %q", text)
		}
		distinct[text] = true
	}
}

// TestLoadKeyPairOddChain: a defect after the leaf does not prevent its use. Whole certificates
// are sent, others are left out and reported.
func TestLoadKeyPairOddChain(t *testing.T) {
	key, leaf, issuer := pkcs8(t, rsaKey()), validCert(rsaKey(), "host"), validCert(ecKey(), "issuer")
	good := join(key, leaf)
	der, _ := pem.Decode(issuer)
	negative := pemBlock("CERTIFICATE", negativeSerial(t, der.Bytes))
	if _, err := x509.ParseCertificate(negativeSerial(t, der.Bytes)); err == nil {
		t.Fatal("the serial number is not negative")
	}
	for _, tt := range []struct {
		name    string
		data    []byte
		chain   int
		leftOut []string
	}{
		{"negative serial number", join(good, negative), 2, nil},
		{"and another one behind it", join(good, negative, issuer), 3, nil},
		{"not DER", join(good, pemBlock("CERTIFICATE", []byte{0x30, 0x01}), issuer), 2, []string{"certificate 2: cannot be parsed"}},
		{"something behind the DER", join(good, pemBlock("CERTIFICATE", append(der.Bytes, 0))), 1, []string{"certificate 2"}},
		{"cut off", join(good, issuer[:200]), 1, []string{"certificate 2: damaged or truncated PEM block"}},
		{"cut off, and a whole one", join(good, issuer[:200], issuer), 2, []string{"certificate 2: damaged"}},
		{"no base64", join(good, []byte("-----BEGIN CERTIFICATE-----\n!!!\n-----END CERTIFICATE-----\n"), issuer), 2, []string{"certificate 2: damaged"}},
		{"damaged parameters", join(good, []byte("-----BEGIN DH PARAMETERS-----\n!!!\n"), issuer), 2, nil},
		{"a second key, damaged", join(good, key[:200]), 1, nil},
		{"binary garbage", append(bytes.Clone(good), "\x00\xff\n\x80"...), 1, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cert, leftOut, err := LoadKeyPair(writeFile(t, tt.data))
			if err != nil {
				t.Fatal(err)
			}
			if len(cert.Certificate) != tt.chain || cert.Leaf.Subject.CommonName != "host" {
				t.Errorf("got %d certificates, leaf %v, want %d", len(cert.Certificate), cert.Leaf.Subject, tt.chain)
			}
			if len(leftOut) != len(tt.leftOut) {
				t.Fatalf("left out: got %q, want %q", leftOut, tt.leftOut)
			}
			for i, want := range tt.leftOut {
				if !strings.HasPrefix(leftOut[i].Error(), want) {
					t.Errorf("left out: got %q, want %q", leftOut[i], want)
				}
				checkNoKey(t, leftOut[i].Error(), key)
			}
		})
	}
}

// negativeSerial makes the serial number 1 of a certificate -1.
func negativeSerial(t *testing.T, der []byte) []byte {
	t.Helper()
	version := []byte{0xa0, 3, 2, 1, 2}
	one, minusOne := append(version, 2, 1, 1), append(version, 2, 1, 0xff)
	if bytes.Count(der, one) != 1 {
		t.Fatal("the serial number is not 1")
	}
	return bytes.Replace(der, one, minusOne, 1)
}

// checkNoKey fails when text quotes any 8 characters of the key's PEM body.
func checkNoKey(t *testing.T, text string, key []byte) {
	t.Helper()
	block, _ := pem.Decode(key)
	body := base64.StdEncoding.EncodeToString(block.Bytes)
	for i := 0; i+8 <= len(body); i++ {
		if strings.Contains(text, body[i:i+8]) {
			t.Errorf("text %q quotes the key", text)
			return
		}
	}
}

func TestLoadKeyPairWeakKey(t *testing.T) {
	t.Setenv("GODEBUG", "rsa1024min=0")
	weak, err := rsa.GenerateKey(rand.Reader, 768)
	if err != nil {
		t.Fatal(err)
	}
	data := join(pkcs8(t, weak), validCert(weak, "host"))
	if _, _, err := LoadKeyPair(writeFile(t, data)); !errors.Is(err, errWeakKey) {
		t.Errorf("got %v, want %v", err, errWeakKey)
	}
}

func TestLoadKeyPairUnreadable(t *testing.T) {
	dir := t.TempDir()
	if _, _, err := LoadKeyPair(filepath.Join(dir, "missing")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing file: got %v, want %v", err, fs.ErrNotExist)
	}
	if _, _, err := LoadKeyPair(dir); !errors.Is(err, errNotRegular) {
		t.Errorf("directory: got %v, want %v", err, errNotRegular)
	}
	loop := filepath.Join(dir, "loop")
	if err := os.Symlink(loop, loop); err != nil {
		t.Fatal(err)
	}
	if _, _, err := LoadKeyPair(loop); !errors.Is(err, syscall.ELOOP) {
		t.Errorf("symbolic link to itself: got %v, want %v", err, syscall.ELOOP)
	}
	path := filepath.Join(dir, "secret")
	if err := os.WriteFile(path, []byte("x"), 0); err != nil {
		t.Fatal(err)
	}
	want := fs.ErrPermission
	if os.Geteuid() == 0 {
		want = errNoPEM // root may read everything
	}
	if _, _, err := LoadKeyPair(path); !errors.Is(err, want) {
		t.Errorf("mode 0: got %v, want %v", err, want)
	}
}

func FuzzParse(f *testing.F) {
	good := join(pkcs8(f, ecKey()), validCert(ecKey(), "host"))
	f.Add(good)
	f.Add(good[:len(good)/2])
	f.Add([]byte("-----BEGIN PRIVATE KEY-----\n-----END PRIVATE KEY-----\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		cert, _, err := parse(data)
		if err == nil && (cert.Leaf == nil || cert.PrivateKey == nil || len(cert.Certificate) == 0) {
			t.Errorf("got an incomplete certificate without an error: %+v", cert)
		}
	})
}
