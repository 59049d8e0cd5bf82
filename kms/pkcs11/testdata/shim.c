// A PKCS#11 module that passes everything on to another one (MODULE) and
// misbehaves while files of certain names lie beside it:
//
//   hang           searching and encrypting do not return
//   device-error   searching says CKR_DEVICE_ERROR
//   general-error  encrypting and decrypting say CKR_GENERAL_ERROR
//   final-try      tokens say that one more wrong PIN locks them
//   locked         tokens say that they are locked
//
// Each login appends a byte to the file "logins".
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <libgen.h>
#include <stdio.h>
#include <unistd.h>

#include "pkcs11go.h"

static CK_FUNCTION_LIST list;
static CK_FUNCTION_LIST_PTR real;
static char dir[2048];

static void path(char *out, size_t n, const char *name) { snprintf(out, n, "%s/%s", dir, name); }

static int is(const char *name) {
	char file[4096];
	path(file, sizeof file, name);
	return access(file, F_OK) == 0;
}

static void hang(void) {
	while (is("hang"))
		usleep(2000);
}

static CK_RV find_objects_init(CK_SESSION_HANDLE s, CK_ATTRIBUTE_PTR a, CK_ULONG n) {
	hang();
	return is("device-error") ? CKR_DEVICE_ERROR : real->C_FindObjectsInit(s, a, n);
}

static CK_RV encrypt_init(CK_SESSION_HANDLE s, CK_MECHANISM_PTR m, CK_OBJECT_HANDLE k) {
	hang();
	return is("general-error") ? CKR_GENERAL_ERROR : real->C_EncryptInit(s, m, k);
}

static CK_RV decrypt(CK_SESSION_HANDLE s, CK_BYTE_PTR in, CK_ULONG nin, CK_BYTE_PTR out, CK_ULONG_PTR nout) {
	return is("general-error") ? CKR_GENERAL_ERROR : real->C_Decrypt(s, in, nin, out, nout);
}

static CK_RV login(CK_SESSION_HANDLE s, CK_USER_TYPE u, CK_UTF8CHAR_PTR pin, CK_ULONG n) {
	char file[4096];
	path(file, sizeof file, "logins");
	int fd = open(file, O_WRONLY | O_APPEND | O_CREAT, 0600);
	if (fd < 0 || write(fd, ".", 1) != 1)
		return CKR_HOST_MEMORY;
	close(fd);
	return real->C_Login(s, u, pin, n);
}

static CK_RV get_token_info(CK_SLOT_ID slot, CK_TOKEN_INFO_PTR info) {
	CK_RV rv = real->C_GetTokenInfo(slot, info);
	if (is("final-try"))
		info->flags |= CKF_USER_PIN_FINAL_TRY;
	if (is("locked"))
		info->flags |= CKF_USER_PIN_LOCKED;
	return rv;
}

CK_RV C_GetFunctionList(CK_FUNCTION_LIST_PTR_PTR out) {
	Dl_info self;
	void *module = dlopen(MODULE, RTLD_NOW | RTLD_LOCAL);
	CK_C_GetFunctionList get = module ? (CK_C_GetFunctionList)dlsym(module, "C_GetFunctionList") : NULL;
	if (!get || get(&real) != CKR_OK || !dladdr((void *)C_GetFunctionList, &self))
		return CKR_GENERAL_ERROR;
	char name[2048];
	snprintf(name, sizeof name, "%s", self.dli_fname);
	snprintf(dir, sizeof dir, "%s", dirname(name));
	list = *real;
	list.C_FindObjectsInit = find_objects_init;
	list.C_EncryptInit = encrypt_init;
	list.C_Decrypt = decrypt;
	list.C_Login = login;
	list.C_GetTokenInfo = get_token_info;
	*out = &list;
	return CKR_OK;
}
