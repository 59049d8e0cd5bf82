package transit

import (
	"time"

	"github.com/cryptcsi/cryptcsi/kms"
)

// SetClock gives the logins of a backend that logs in another clock.
func SetClock(b kms.Backend, now func() time.Time) { b.(*Backend).tokens.(*login).now = now }
