package service

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"

	"xapi-nbd/cmd/xapi-nbd/internal/config"
	"xapi-nbd/cmd/xapi-nbd/internal/control"
	"xapi-nbd/vdi"
	"xapi-nbd/xapi"
)

// CleanUp removes the leftover VBDs of this host, without a service. The error matches
// vdi.ErrLocked while another process works; ErrXapiUnreachable if xapi does not answer; or
// vdi.ErrLeft if it is not known whether something is left. Other errors are those of the
// state folder and of the inventory.
func CleanUp(ctx context.Context, cfg config.Config, log *slog.Logger) (result vdi.Recovered, err error) {
	client := xapi.New(xapi.Config{Socket: cfg.XapiSocket, Logger: log})
	defer client.Close()
	disks, err := vdi.Open(diskConfig(cfg, client, nil, log))
	if err != nil {
		return result, err
	}
	result, err = disks.Recover(ctx)
	if err != nil && !errors.Is(err, vdi.ErrLocked) {
		err = &kindError{recoveryKind(err), err}
	}
	// Close need not wait for leftovers: Recover has tried to remove each.
	closing, cancel := context.WithCancel(ctx)
	cancel()
	if cerr := disks.Close(closing); cerr != nil && !errors.Is(cerr, vdi.ErrLeft) && err == nil {
		err = &kindError{vdi.ErrLeft, cerr}
	}
	return result, err
}

// AskToCleanUp has the service whose control socket is at path clean up. Its errors are
// those of CleanUp.
func AskToCleanUp(ctx context.Context, path string) (vdi.Recovered, error) {
	var report control.RecoverReport
	if err := control.Ask(ctx, path, http.MethodPost, "/recover", &report); err != nil {
		return report.Recovered, &kindError{vdi.ErrLeft, fmt.Errorf("it is not known whether VBDs are left: %w", err)}
	}
	return report.Recovered, recoverError(report)
}
