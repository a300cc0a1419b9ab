package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
)

// ErrNoRequest is the error of Ask for a request that the service does not know: it is older
// than this program.
var ErrNoRequest = errors.New("the running service does not know this request: it is too old")

// Ask sends a request to the service whose control socket is at path and decodes the
// answer, one of the Report types, to answer. Without a service the error matches
// [os.ErrNotExist] or ECONNREFUSED.
func Ask(ctx context.Context, path, method, target string, answer any) error {
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", path)
	}}
	defer transport.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, method, "http://localhost"+target, nil)
	if err != nil {
		return err
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return fmt.Errorf("the running service does not answer on its control socket: %w", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusNotFound {
		return ErrNoRequest
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("the running service answers %s", resp.Status)
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, 16<<20))
	if err != nil {
		return err
	}
	return json.Unmarshal(body, answer)
}
