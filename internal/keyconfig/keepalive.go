package keyconfig

import (
	"context"
	"log/slog"
	"strconv"
	"time"

	"github.com/cryptcsi/cryptcsi/kms"
)

// KeepAliveEvery is how often a process that serves labels its KEK as in use.
const KeepAliveEvery = 6 * time.Hour

// LabelActive labels a KEK as in use at that time.
func LabelActive(ctx context.Context, kek *kms.KEK, now time.Time) error {
	return kek.LabelKey(ctx, map[string]string{kms.LabelActive: strconv.FormatInt(now.Unix(), 10)})
}

// KeepAlive labels KEKs as in use now and every KeepAliveEvery until ctx ends:
// one that only unwraps is in use too. Failing does no harm but that a KEK
// looks abandoned some day.
func KeepAlive(ctx context.Context, keks []*kms.KEK, log *slog.Logger) {
	ticker := time.NewTicker(KeepAliveEvery)
	defer ticker.Stop()
	for {
		for _, kek := range keks {
			if err := LabelActive(ctx, kek, time.Now()); err != nil && ctx.Err() == nil {
				log.Warn("the KEK could not be labelled as in use", "kek", kek.Name(), "error", err)
			}
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return
		}
	}
}
